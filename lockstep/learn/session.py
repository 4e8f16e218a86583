"""What surrounds a loop that trains a language model: progress, metrics, evaluations, samples, checkpoints, the stop.

A loop reads

    session.begin(parts, write_model)         # restores every part when the run is resumed
    while session.running:
        ... collect, learn ...
        session.advance(metrics)              # one update is done
        if session.evaluation_due:
            session.record(scores)
        session.checkpoint()                  # if one is due; raises when somebody asked the run to stop
    return session.finish()

and stays a loop; the session never calls back into it. What a line of the loop logs at step s is on disk before the
checkpoint of step s, so a resumed run first forgets what is beyond its checkpoint and then repeats it exactly. With each
checkpoint the model's folder is written anew: it can be served and evaluated while the run goes on, or after it was stopped.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lockstep.checkpoint.store import Checkpointer
from lockstep.core.errors import ConfigError, DivergedError, StoppedError
from lockstep.core.state import Stateful
from lockstep.kernels.memory import keep_memory
from lockstep.runs.directory import RunDirectory
from lockstep.runs.sink import MetricSink
from lockstep.runs.stats import mean_interval

BESIDE = ("averaged", "trained", "teacher")
"""Numbers of an evaluation that are scores too, of other weights on the same problems."""

ProgressHook = Callable[[int, int, Mapping[str, float]], None]
EventHook = Callable[[int, str], None]
WriteModel = Callable[[Path, Mapping[str, Any]], None]
"""Writes weights and tokenizer into a folder, in place of an older one, given what came out for its card."""


@dataclass(frozen=True, kw_only=True)
class UpdatesConfig:
    """How many updates a run makes and what it leaves behind."""

    total_steps: int = 100
    """Updates: batches that were collected and learned from."""
    seed: int = 1
    """Seeds weights, data order and sampling noise."""
    threads: int = 0
    """Threads of the kernels, in all processes together (0: one a processor)."""
    log_every: int = 1
    """Updates between two metric lines."""
    eval_every: int = 0
    """Updates between two evaluations (0: only at the start and the end)."""
    checkpoint_every: int = 0
    """Updates between two checkpoints (0: total_steps / 10)."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the best by evaluation is kept besides."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    wandb_project: str = ""
    """Weights & Biases project to log to (empty: none; needs the wandb extra)."""


@dataclass
class Result:
    """What a finished run yields."""

    steps: int
    train_seconds: float
    first: Scores | None = None
    """The evaluation before the first update."""
    last: Scores | None = None
    """The evaluation after the last."""
    model_path: Path | None = None
    """Folder with weights and tokenizer."""


@dataclass(frozen=True)
class Scores:
    """Values of an evaluation, one a problem.

    >>> low, high = Scores((1.0, 0.0, 1.0, 1.0)).interval
    >>> Scores((1.0, 0.0, 1.0, 1.0)).mean, round(low, 2), round(high, 2)
    (0.75, 0.3, 0.95)
    """

    values: tuple[float, ...]
    step: int = 0
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of the evaluation."""

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mean over problems, `mean_interval`."""
        if not self.values:
            return math.nan, math.nan
        found = mean_interval(self.values)
        return found.low, found.high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.3f} (95% interval {low:.3f} to {high:.3f}, {len(self.values)} problems)"


class Session:
    """One run: see the module's docstring.

    Args:
        config: length and outputs.
        directory: where to write; None keeps nothing on disk. The caller opens and ends it.
        sink: takes the metrics when there is no directory.
        on_progress: called with (step, total, metrics) at every metric line.
        on_event: called with (step, text) when something happened that a person should know, from any thread.
        resume: restore the newest checkpoint of `directory` in `begin`.
    """

    def __init__(
        self,
        config: UpdatesConfig,
        *,
        directory: RunDirectory | None = None,
        sink: MetricSink | None = None,
        on_progress: ProgressHook | None = None,
        on_event: EventHook | None = None,
        resume: bool = False,
    ) -> None:
        if config.total_steps < 1:
            raise ConfigError(f"total_steps={config.total_steps}; expected at least 1")
        self.config = config
        self.directory, self.sink, self.resume = directory, sink, resume
        self.on_progress, self.on_event = on_progress, on_event
        self.seed = config.seed
        self.step = 0
        self.stop_requested = False
        self.first: Scores | None = None
        self.last: Scores | None = None
        self.events: Counter[str] = Counter()
        """How often each kind happened."""
        self._event_lock = threading.Lock()
        self._parts: dict[str, Stateful] = {}
        self._write: WriteModel | None = None
        self._saved_step = self._written_step = -1
        self._checkpoint_every = config.checkpoint_every or max(config.total_steps // 10, 1)
        self._seconds = 0.0
        self._clock = time.perf_counter()
        self._checkpoints = (
            Checkpointer(directory.checkpoints_path, keep_last=config.keep_checkpoints) if directory else None
        )

    @property
    def running(self) -> bool:
        return self.step < self.config.total_steps

    @property
    def restores(self) -> bool:
        """Whether `begin` will restore a checkpoint: what only a new run does can be left out."""
        return self.resume and self._checkpoints is not None and self._checkpoints.latest() is not None

    @property
    def progress(self) -> float:
        """Fraction of the updates done, 0 to 1; schedules read it."""
        return min(self.step / self.config.total_steps, 1.0)

    @property
    def train_seconds(self) -> float:
        """Seconds spent collecting and learning, without evaluations, checkpoints and metric lines."""
        return self._seconds

    @property
    def evaluation_due(self) -> bool:
        """At the start, every `eval_every` updates, and at the end; not twice at one step."""
        if self.last is not None and self.last.step == self.step:
            return False
        every = self.config.eval_every
        return self.step == 0 or not self.running or (every > 0 and self.step % every == 0)

    def begin(self, parts: dict[str, Stateful], write_model: WriteModel | None = None) -> None:
        """Name every part of the training state, and who writes the model; restore them when resuming."""
        self._parts, self._write = parts, write_model
        if self.restores:
            self._restore()
        if self.directory is not None:
            if self.resume:
                for name in (".model*", ".adapter*"):  # of a write that a kill interrupted
                    for left in self.directory.path.glob(name):
                        shutil.rmtree(left, ignore_errors=True)
                self.directory.rewind(self.step, -1 if self.last is None else self.last.step)
            self.sink = self.directory.sink(
                tensorboard=self.config.tensorboard, wandb_project=self.config.wandb_project
            )
            if self.restores and not self.directory.model_path.is_dir():
                self._write_model()  # killed between a checkpoint and its model
        self._clock = time.perf_counter()

    def advance(self, metrics: Mapping[str, float]) -> None:
        """One update is done. A metric that has no value this time is left out or NaN.

        Raises:
            DivergedError: a metric is infinite; nothing of this step is written.
        """
        self._seconds += time.perf_counter() - self._clock
        bad = [name for name, value in metrics.items() if math.isinf(float(value))]
        if bad:
            raise DivergedError(
                f"training diverged at step {self.step}: {', '.join(bad[:4])} not finite; lower the learning rate or clip "
                "gradients, then start anew or resume from the last checkpoint"
            )
        self.step += 1
        if self.step % self.config.log_every == 0 or not self.running:
            with self._event_lock:
                counted = {**metrics, **self.events}
            line = {name: float(value) for name, value in counted.items()}
            if self.sink is not None:
                self.sink.log(self.step, {**line, "train_s": self._seconds})
            if self.on_progress is not None:
                self.on_progress(self.step, self.config.total_steps, line)
        self._clock = time.perf_counter()

    def note(self, metrics: Mapping[str, float]) -> None:
        """Numbers to show that are no update's, such as those of a supervised start; they are not written.

        Raises:
            StoppedError: asked to stop before there is anything that a checkpoint could keep.
        """
        if self.stop_requested:
            raise StoppedError(f"stopped before update {self.step + 1:,} of {self.config.total_steps:,}")
        if self.on_progress is not None:
            self.on_progress(self.step, self.config.total_steps, metrics)

    def record(self, scores: Scores) -> None:
        """An evaluation of the weights of this step."""
        scores = Scores(scores.values, self.step, scores.extra)
        self.last = scores
        self._saved_step = -1  # a checkpoint of this step does not know of it
        if self.step == 0:
            self.first = scores
        low, high = scores.interval
        if self.directory is not None:
            extra: dict[str, Any] = {"low": low, "high": high, **scores.extra}
            self.directory.log_eval(self.step, scores.values, final=int(not self.running), **extra)
        if self.on_progress is not None:
            beside = {name: float(scores.extra[name]) for name in BESIDE if name in scores.extra}
            self.on_progress(self.step, self.config.total_steps, {"eval": scores.mean, **beside})
        self._clock = time.perf_counter()

    def event(self, kind: str, text: str) -> None:
        """Something happened that a person should know: a line of `events.jsonl`, and every later metric line counts its kind.

        Safe to call from several threads.
        """
        with self._event_lock:
            self.events[kind] += 1
            if self.directory is not None:
                self.directory.log_event(self.step, kind, text)
        if self.on_event is not None:
            self.on_event(self.step, text)

    def log_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Samples for people to read, `samples.jsonl`."""
        if self.directory is not None:
            self.directory.log_samples(self.step, samples)

    def checkpoint(self) -> None:
        """Saves, if a checkpoint is due or somebody asked the run to stop.

        Raises:
            StoppedError: asked to stop; the state is saved.
        """
        due = self.step % self._checkpoint_every == 0 or self.stop_requested
        if due and self.step != self._saved_step:
            self._save()
        if self.stop_requested and self.running:
            where = f"; go on with: lockstep train --resume {self.directory.path}" if self.directory else ""
            raise StoppedError(f"stopped at step {self.step:,} of {self.config.total_steps:,}{where}")
        self._clock = time.perf_counter()

    def finish(self, **passport: Any) -> Result:
        """Last checkpoint, the model's folder, and the passport.

        Args:
            passport: plain values that identify the run beside its config and versions: digests, counters.
        """
        if self.step != self._saved_step:
            self._save()
        elif self.step != self._written_step:
            self._write_model()  # killed after its last checkpoint
        path = None
        if self.directory is not None:
            path = None if self._write is None else self.directory.model_path
            self.directory.write_passport({"steps": self.step, "scores": _told(self), **passport})
        self.close()
        return Result(self.step, self._seconds, self.first, self.last, path)

    def close(self) -> None:
        """Release the metric sink; safe to call twice, and what leaving a `with` block does."""
        if self.sink is not None:
            self.sink.close()

    def __enter__(self) -> Self:
        keep_memory()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _save(self) -> None:
        self._saved_step = self.step
        if self._checkpoints is None:
            return
        state = {
            "session": {
                "step": self.step,
                "seconds": self._seconds,
                "first": _plain(self.first),
                "last": _plain(self.last),
                "events": dict(self.events),
            },
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }
        score = self.last.mean if self.last is not None and self.last.step == self.step else None
        self._checkpoints.save(self.step, state, score)
        try:
            self._write_model()
        except ConfigError as error:  # the state is saved, and the older model still stands
            if not self.running:
                raise
            self.event("model", f"the model of step {self.step:,} is not written: {error}")

    def _write_model(self) -> None:
        if self.directory is not None and self._write is not None:
            facts = {"steps": self.step, "train seconds": f"{self._seconds:.1f}", **_told(self)}
            self._write(self.directory.model_path, facts)
        self._written_step = self.step

    def _restore(self) -> None:
        assert self._checkpoints is not None
        _, state = self._checkpoints.load()
        saved = state["session"]
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self.step, self._seconds = saved["step"], saved["seconds"]
        self.first, self.last = _scores(saved["first"]), _scores(saved["last"])
        self.events = Counter(saved.get("events", {}))  # older checkpoints have none
        self._saved_step = self.step


def _told(session: Session) -> dict[str, str]:
    """The first and the last scores in words; an older score is not called this model's."""
    first, last = session.first, session.last
    told = {} if first is None else {"before": str(first)}
    if last is not None and (last.step or not session.running):
        told["after" if last.step == session.step else f"after {last.step:,} steps"] = str(last)
    return told


def _plain(scores: Scores | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    return {"values": list(scores.values), "step": scores.step, "extra": json.loads(json.dumps(dict(scores.extra)))}


def _scores(saved: dict[str, Any] | None) -> Scores | None:
    return None if saved is None else Scores(tuple(saved["values"]), saved["step"], saved["extra"])
