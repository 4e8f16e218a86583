"""200 updates of PPO on a stored network, on a task of its own shapes, and the return before and after."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lockstep.api import evaluate
from lockstep.api import train as train_policy
from lockstep.core.errors import ConfigError
from lockstep.models.control.imported import without_marker
from lockstep.models.graph import GraphModule, save_graph
from lockstep.models.graph.states import carried

NUM_UPDATES, EPISODES = 200, 32
LEAST_BYTES = 16.0
"""The least that the largest value of an image of bytes may be."""


@dataclass(frozen=True)
class Trained:
    """Mean returns of 32 episodes of drawn actions, and the 95% interval of the second."""

    before: float
    after: float
    interval: tuple[float, float]


def train_stored(
    module: GraphModule, x: np.ndarray, num_outputs: int, *, continuous: bool, time_axis: int | None
) -> Trained:
    """Train and evaluate.

    Args:
        module: the network; its first output of `num_outputs` columns becomes the policy.
        x: input that is stored beside it, which tells the shapes.
        continuous: that output is the mean of a normal distribution, else logits.
        time_axis: of a network that reads sequences, else None.

    Raises:
        ConfigError: no policy can be made of it.
    """
    is_image = x.ndim == 4
    channels_last = is_image and x.shape[3] <= 4
    columns = int(x.shape[3 if channels_last else 1] if is_image else x.shape[-1])
    height, width = (x.shape[1:3] if channels_last else x.shape[2:4]) if is_image else (0, 0)
    about = module.graph.about
    layout = about.layout or ("NHWC" if channels_last else "NCHW" if is_image else "")
    # Images are bytes. Some networks scale those themselves, as their stored input shows; others want numbers around zero.
    is_scaled = is_image and float(np.abs(x).max()) < LEAST_BYTES
    mean, scale = ((128.0,), 1 / 255) if is_scaled else (about.mean, about.scale)
    is_sequence = time_axis is not None or x.ndim == 3
    axis = about.time_axis if time_axis is None else time_axis
    module.graph = replace(module.graph, about=replace(about, layout=layout, mean=mean, scale=scale, time_axis=axis))
    module = without_marker(module)
    # Only the last output of a sequence, or a length that the file fixes: it gets so many frames.
    frames = 1 if not is_sequence or carried(module, axis or 0) else x.shape[axis or 1]
    # An action of a distribution says little, a choice among few a lot: where it is a choice, fewer steps make an update.
    num_envs, num_steps = 8, 4 if continuous else 2
    means = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        save_graph(module, out / "network")
        for rate, updates in ((1e-12, 1), (5e-4 if is_image else 3e-3, NUM_UPDATES)):
            run = train_policy(
                "ppo-cartpole",
                out=out / f"runs{updates}",
                env__id="lockstep.cli.bench_imports_task:Pointing",
                env__kwargs={
                    "columns": columns,
                    "actions": num_outputs,
                    "continuous": continuous,
                    "height": height,
                    "width": width,
                },
                env__num_envs=num_envs,
                network__imported=str(out / "network"),
                frame_stack=frames,
                num_steps=num_steps,
                num_epochs=1,
                learning_rate=rate,
                learning_rate_end=None,
                minibatch_size=num_envs * num_steps,
                gamma=0.01,
                run__total_steps=updates * num_envs * num_steps,
                run__final_episodes=0,
                run__eval_every=0,
                run__tensorboard=False,
            )
            found = evaluate(run.path, episodes=EPISODES, deterministic=False)
            means.append(found.mean)
    if not np.isfinite(means).all():
        raise ConfigError(f"returns {means} of a network of {num_outputs} outputs are not finite")
    return Trained(means[0], means[1], found.interval)
