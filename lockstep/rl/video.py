"""Episodes as mp4 or gif."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.core.errors import ConfigError
from lockstep.core.extras import require
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env, rendering
from lockstep.envs.control.stepper import Stepper
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy

VIDEO_KINDS = (".mp4", ".gif")


def record_episodes(
    policy: Policy, env: EnvConfig, out: Path, *, episodes: int, seed: int, fps: int = 0, max_frames: int = 10_000
) -> list[float]:
    """Play with the policy's best actions and write the frames.

    Args:
        out: `.mp4` or `.gif`; its folder is made if missing.
        fps: frames per second; 0 takes the environment's own.
        max_frames: of all episodes together; an unfinished episode is cut there.

    Returns:
        Return of each finished episode.

    Raises:
        ConfigError: another suffix, no episodes, or a file that cannot be written.
        EnvError: the environment gives no picture.
    """
    if out.suffix not in VIDEO_KINDS:
        raise ConfigError(f"video {out} has suffix {out.suffix!r}; expected one of {', '.join(VIDEO_KINDS)}")
    if episodes < 1 or fps < 0:
        raise ConfigError(f"episodes={episodes}, fps={fps}; expected at least 1 and 0")
    imageio = require("imageio.v2", extra="video")
    config = rendering(replace(env, clip_reward=False))
    stepper = make_env(config, seed=seed)
    # Frames are written as they come, to a file beside that takes its name when it is whole.
    partial = out.with_name(f".partial-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fps = fps or int(stepper.env.metadata.get("render_fps", 30))
        with imageio.get_writer(partial, mode="I", **_options(out, fps)) as writer:
            returns = _play(stepper, policy, writer, episodes=episodes, seed=seed, max_frames=max_frames)
        partial.replace(out)
    except OSError as error:
        raise ConfigError(f"video {out} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
        stepper.close()
    return returns


def _play(stepper: Stepper, policy: Policy, writer: Any, *, episodes: int, seed: int, max_frames: int) -> list[float]:
    returns: list[float] = []
    actor = Actor(policy, 1, seed=seed)
    obs = stepper.reset(seed)
    for _ in range(max_frames):
        frame = stepper.render()
        height, width = (size - size % 2 for size in frame.shape[:2])  # H.264 wants even sizes
        writer.append_data(np.ascontiguousarray(frame[:height, :width]))
        result = stepper.step(actor.act(obs, deterministic=True).env_action.numpy())
        actor.advance(result.starts_N, result.valid_N)
        obs = result.obs
        returns += [float(end.episode_return) for end in result.episodes]
        if len(returns) >= episodes:
            break
    return returns


def _options(out: Path, fps: int) -> dict[str, Any]:
    return {"duration": 1000.0 / fps, "loop": 0} if out.suffix == ".gif" else {"fps": fps, "macro_block_size": 1}
