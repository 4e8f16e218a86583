"""What surrounds a learning loop: progress, metrics, evaluation, checkpoints, the decision to stop.

A loop reads

    session.begin(policy, env.about, parts)       # restores every part when the run is resumed
    while session.running:
        ... collect, learn ...
        session.advance(num_steps, metrics, episodes)
    return session.finish()

and stays a loop; the session never calls back into it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch

from lockstep.checkpoint.store import Checkpointer
from lockstep.core.errors import ConfigError, DivergedError, StoppedError
from lockstep.core.state import Stateful
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.episodes import EpisodeEnd
from lockstep.models.control.folder import save_policy
from lockstep.models.control.policy import Policy
from lockstep.rl.evaluate import Evaluation, evaluate
from lockstep.runs.config_json import config_to_json
from lockstep.runs.directory import RunDirectory
from lockstep.runs.sink import MetricSink

ProgressHook = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long a run lasts and what it leaves behind."""

    total_steps: int = 100_000
    """Environment steps of training, rounded up to whole updates: rollouts of num_steps * env.num_envs for PPO and A2C,
    rounds of replay.train_freq * env.num_envs for replay algorithms. BC and IQL: gradient steps, exactly."""
    seed: int = 1
    """Seeds weights, sampling noise, environments and minibatches."""
    threads: int = 1
    """Threads of the learner's kernels."""
    log_every: int = 0
    """Environment steps between two metric lines (0: total_steps / 200)."""
    eval_every: int = 0
    """Environment steps between two evaluations (0: only at the end)."""
    eval_episodes: int = 20
    """Episodes of each evaluation during training."""
    final_episodes: int = 100
    """Episodes of the evaluation at the end (0: none)."""
    eval_deterministic: bool = True
    """Evaluate the distribution's mode rather than samples."""
    stop_at_return: float = math.inf
    """Stop once an evaluation during training reaches this mean return."""
    checkpoint_every: int = 0
    """Environment steps between two checkpoints (0: total_steps / 10)."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the best by evaluation is kept besides."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    wandb_project: str = ""
    """Weights & Biases project to log to (empty: none; needs the wandb extra)."""


@dataclass
class Result:
    """What a finished run yields.

    >>> Result(None, None, 0, 1.5).train_seconds
    1.5
    """

    policy: Policy | None
    evaluation: Evaluation | None
    steps: int
    train_seconds: float


class Session:
    """One run: see the module's docstring.

    Args:
        config: length and outputs.
        env: what evaluations run on.
        directory: where to write; None keeps nothing on disk. The caller opens and ends it.
        sink: takes the metrics when there is no directory.
        on_progress: called with (step, total, metrics) at every metric line.
        resume: restore the newest checkpoint of `directory` in `begin`.
    """

    def __init__(
        self,
        config: RunConfig,
        env: EnvConfig,
        *,
        directory: RunDirectory | None = None,
        sink: MetricSink | None = None,
        on_progress: ProgressHook | None = None,
        resume: bool = False,
    ) -> None:
        if config.total_steps < 1:
            raise ConfigError(f"total_steps={config.total_steps}; expected at least 1")
        self.config, self.env = config, env
        self.directory, self.sink, self.on_progress, self.resume = directory, sink, on_progress, resume
        self.seed = config.seed
        self.step = 0
        self.updates = 0
        self.solved = False
        self.policy: Policy | None = None
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.recent: deque[tuple[float, int]] = deque(maxlen=100)
        self.num_episodes = 0
        self._parts: dict[str, Stateful] = {}
        self._log_every = config.log_every or max(config.total_steps // 200, 1)
        self._checkpoint_every = config.checkpoint_every or max(config.total_steps // 10, 1)
        self._finished = False
        self.stop_requested = False
        self._train_seconds = 0.0
        self._clock = 0.0
        self._last_log = (0, 0.0)
        keep = config.keep_checkpoints
        self._checkpoints = Checkpointer(directory.checkpoints_path, keep_last=keep) if directory else None

    @property
    def running(self) -> bool:
        """False once the steps are done or an evaluation reached `stop_at_return`."""
        return self.step < self.config.total_steps and not self.solved

    @property
    def progress(self) -> float:
        """Fraction of the steps done, 0 to 1; schedules read it."""
        return min(self.step / self.config.total_steps, 1.0)

    @property
    def train_seconds(self) -> float:
        """Seconds spent collecting and learning, without evaluation, checkpoints and metric lines."""
        return self._train_seconds

    def begin(self, policy: Policy, parts: dict[str, Stateful]) -> None:
        """Name the policy and every other part of the training state; restore them when resuming."""
        self.policy = policy
        self._parts = parts
        if self.resume and self._checkpoints is not None and self._checkpoints.latest() is not None:
            self._restore()
        if self.directory is not None:
            if self.resume:
                self.directory.rewind(self.step)
            self.sink = self.directory.sink(
                tensorboard=self.config.tensorboard, wandb_project=self.config.wandb_project
            )
        self._clock = time.perf_counter()
        self._last_log = (self.step, self._train_seconds)

    def advance(self, num_steps: int, metrics: Mapping[str, torch.Tensor | float], episodes: list[EpisodeEnd]) -> None:
        """Account for `num_steps` environment steps that were collected and learned from."""
        self._train_seconds += time.perf_counter() - self._clock
        before, self.step = self.step, self.step + num_steps
        self.updates += 1
        for end in episodes:
            self.recent.append((float(end.episode_return), int(end.length)))
            self.num_episodes += 1
        crossed = self._crossed(before)
        if self.stop_requested or crossed(self._log_every) or crossed(self._checkpoint_every):
            self._check_finite(metrics)
        if crossed(self.config.eval_every):
            self._evaluate()
        if crossed(self._log_every):
            self._log(metrics)
        if crossed(self._checkpoint_every) and self.running:
            self._save()
        if self.stop_requested and self.running:
            self._save()
            where = f"; go on with: lockstep train --resume {self.directory.path}" if self.directory else ""
            raise StoppedError(f"stopped at step {self.step:,} of {self.config.total_steps:,}{where}")
        self._clock = time.perf_counter()

    def finish(self) -> Result:
        """Final evaluation, checkpoint and policy folder."""
        assert self.policy is not None
        self._check_finite({})
        evaluation = self.evaluations[-1][1] if self._finished else None
        if self._finished:
            self._write_policy()  # killed after its last checkpoint
        elif self.config.final_episodes:
            evaluation = self._run_evaluation(self.config.final_episodes)
            self._record(evaluation, final=True)
            self._finished = True
            self._save()
        else:
            self._save()
        self.close()
        return Result(self.policy, evaluation, self.step, self.train_seconds)

    def close(self) -> None:
        """Release the metric sink; safe to call twice, and what leaving a `with` block does."""
        if self.sink is not None:
            self.sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _crossed(self, before: int) -> Callable[[int], bool]:
        return lambda every: every > 0 and (before // every != self.step // every or not self.running)

    def _check_finite(self, metrics: Mapping[str, torch.Tensor | float]) -> None:
        """No NaN is checkpointed or saved.

        Raises:
            DivergedError: a metric or a weight is not finite.
        """
        assert self.policy is not None
        bad = [name for name, value in metrics.items() if not math.isfinite(float(value))]
        bad += [name for name, p in self.policy.named_parameters() if not bool(torch.isfinite(p.detach()).all())]
        if bad:
            raise DivergedError(
                f"training diverged at step {self.step:,}: {', '.join(bad[:4])} not finite; lower the learning rate or "
                "clip gradients, then start anew or resume from the last checkpoint"
            )

    def _evaluate(self) -> None:
        evaluation = self._run_evaluation(self.config.eval_episodes)
        self._record(evaluation, final=False)
        self.solved = evaluation.mean >= self.config.stop_at_return

    def _run_evaluation(self, episodes: int) -> Evaluation:
        assert self.policy is not None
        deterministic = self.config.eval_deterministic
        return evaluate(self.policy, self.env, episodes=episodes, seed=self.seed, deterministic=deterministic)

    def _record(self, evaluation: Evaluation, *, final: bool) -> None:
        self.evaluations.append((self.step, evaluation))
        if self.directory is not None:
            self.directory.log_eval(
                self.step, evaluation.returns, lengths=list(map(float, evaluation.lengths)), final=int(final)
            )

    def _log(self, metrics: Mapping[str, torch.Tensor | float]) -> None:
        steps, seconds = self._last_log
        line = {name: float(value) for name, value in metrics.items()}
        if self.recent:
            line["return"] = sum(r for r, _ in self.recent) / len(self.recent)
            line["length"] = sum(n for _, n in self.recent) / len(self.recent)
        line["episodes"] = float(self.num_episodes)
        if self.evaluations:
            line["eval_return"] = self.evaluations[-1][1].mean
        elapsed = self._train_seconds - seconds
        rate = (self.step - steps) / elapsed if elapsed > 0 else 0.0
        self._last_log = (self.step, self._train_seconds)
        if self.sink is not None:
            self.sink.log(self.step, {**line, "steps_per_s": rate, "train_s": self._train_seconds})
        if self.on_progress is not None:
            self.on_progress(self.step, self.config.total_steps, {**line, "steps_per_s": rate})

    def _save(self) -> None:
        if self._checkpoints is None:
            return
        assert self.policy is not None
        self.policy.version = self.step
        score = self.evaluations[-1][1].mean if self.evaluations and self.evaluations[-1][0] == self.step else None
        state = {
            "session": {
                "step": self.step,
                "updates": self.updates,
                "solved": self.solved,
                "finished": self._finished,
                "num_episodes": self.num_episodes,
                "recent": [list(item) for item in self.recent],
                "train_seconds": self._train_seconds,
                "digest": self.policy.digest(),
                "last_eval": [self.evaluations[-1][0], list(self.evaluations[-1][1].returns)]
                if self.evaluations
                else [],
            },
            "policy": dict(self.policy.state_dict()),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }
        self._checkpoints.save(self.step, state, score)
        self._write_policy()

    def _write_policy(self) -> None:
        """The policy folder: a server that watches it takes this version up, and a run that was killed can be evaluated."""
        if self.directory is None:
            return
        assert self.policy is not None
        self.policy.version = self.step
        results = {"environment": self.env.id, "steps": self.step, "train seconds": f"{self.train_seconds:.2f}"}
        if self.evaluations and self.evaluations[-1][0] == self.step:
            results["return"] = str(self.evaluations[-1][1])
        save_policy(
            self.policy,
            self.directory.policy_path,
            results=results,
            title=self.directory.path.name,
            environment=config_to_json(self.env),
        )

    def _restore(self) -> None:
        assert self._checkpoints is not None
        assert self.policy is not None
        _, state = self._checkpoints.load()
        saved = state["session"]
        self.policy.load_state_dict(state["policy"])
        if self.policy.digest() != saved["digest"]:
            raise ConfigError("the checkpoint's weights do not have the digest that it names")
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self.step, self.updates, self.solved = saved["step"], saved["updates"], saved["solved"]
        self._finished = saved["finished"]
        self.num_episodes, self._train_seconds = saved["num_episodes"], saved["train_seconds"]
        self.recent.extend((r, n) for r, n in saved["recent"])
        if saved["last_eval"]:
            step, returns = saved["last_eval"]
            self.evaluations.append((step, Evaluation(tuple(returns), (0,) * len(returns), 0.0)))
