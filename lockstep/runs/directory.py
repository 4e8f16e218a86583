"""The folder of one training run, which explains itself.

<root>/<name>-s<seed>-<yyyymmdd-hhmmss>/
  config.json     {"recipe", "name", "seed", "config": the resolved config}
  versions.json   packages, commit, machine, kernels
  run.json        status, process, start and stop times, wall seconds, number of resumes
  metrics.jsonl   {"step", "wall_s", metric: value...}
  eval.jsonl      {"step", "returns": [one an episode], "mean", ...}
  samples.jsonl   of language models: {"step", "prompt", "text", "reward", ...}, for people to read
  events.jsonl    of language models: {"step", "event", "text"}, such as a rollout worker that was lost
  tensorboard/    the same metrics as event files
  checkpoints/    training states
  policy/         the policy of the newest checkpoint, and in the end the finished one
  model/          the language model of the newest checkpoint, as a Hugging Face folder, and in the end the finished one
  passport.json   config, versions, seeds, digests and scores of a finished language model, in one file
  run.lock        held by the process that writes
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lockstep.core.errors import CheckpointError, ConfigError, StoppedError
from lockstep.runs.config_json import config_to_json
from lockstep.runs.jsonl import json_line, trim_partial_line, truncate_after
from lockstep.runs.lock import RunLock
from lockstep.runs.sink import JsonlSink, MetricSink, TeeSink, TensorBoardSink, WandbSink
from lockstep.runs.versions import describe_versions

CONFIG, VERSIONS, RUN = "config.json", "versions.json", "run.json"
METRICS, EVAL, LOCK = "metrics.jsonl", "eval.jsonl", "run.lock"
SAMPLES, EVENTS, PASSPORT = "samples.jsonl", "events.jsonl", "passport.json"


class RunState(StrEnum):
    """Where a run stands. A process that was killed cannot say so: readers see RUNNING without a lock as KILLED."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    KILLED = "killed"


@dataclass(frozen=True)
class RunStatus:
    """Content of run.json. Times are ISO 8601 in UTC; `wall_seconds` sums all processes that worked on the run."""

    status: str
    pid: int
    host: str
    started: str
    stopped: str | None
    wall_seconds: float
    num_resumes: int
    error: str = ""


class RunDirectory:
    """The writing side of a run directory; make one by `create` or `open`, and end it by `finish` or `with`.

    Leaving the `with` block writes finished, failed (an exception, named) or killed (KeyboardInterrupt, SystemExit,
    StoppedError).
    """

    def __init__(self, path: Path, lock: RunLock, status: RunStatus) -> None:
        self.path = path
        self._lock = lock
        self._status = status
        self._wall_before = status.wall_seconds
        self._opened = time.monotonic()
        self._resume_step: int | None = None
        self._write_status(status)

    @classmethod
    def create(
        cls, root: Path, name: str, config: Any, seed: int, *, recipe: str = "", kernels: str = ""
    ) -> RunDirectory:
        """Make a new directory under `root` and take its lock.

        Args:
            root: made if missing.
            name: of the run; letters, digits, `.`, `_`, `-`.
            config: a dataclass, see `config_to_json`.
            seed: of the run.
            recipe: what the config was made from; `name` if empty.
            kernels: kernel variants in use, in words.

        Raises:
            ConfigError: the name is not a file name, or the config cannot be written.
        """
        if not name or not all(letter.isalnum() or letter in "._-" for letter in name) or name.startswith("."):
            raise ConfigError(f"run name {name!r}; expected letters, digits, '.', '_' and '-', not starting with '.'")
        document = {"recipe": recipe or name, "name": name, "seed": seed, "config": config_to_json(config)}
        path = _new_folder(Path(root), f"{name}-s{seed}-{datetime.now():%Y%m%d-%H%M%S}")
        lock = RunLock(path / LOCK)
        _write_json(path / CONFIG, document)
        _write_json(path / VERSIONS, describe_versions(kernels))
        return cls(path, lock, RunStatus(RunState.RUNNING, os.getpid(), socket.gethostname(), _now(), None, 0.0, 0))

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Take an existing run up again.

        Raises:
            CheckpointError: not a run directory, or another process is at work in it.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path} is not a run directory: it has no {CONFIG}")
        lock = RunLock(path / LOCK)
        try:
            before = read_status(path)
            status = RunStatus(
                RunState.RUNNING,
                os.getpid(),
                socket.gethostname(),
                before.started,
                None,
                before.wall_seconds,
                before.num_resumes + 1,
            )
            return cls(path, lock, status)
        except BaseException:
            lock.release()
            raise

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def policy_path(self) -> Path:
        return self.path / "policy"

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def samples_path(self) -> Path:
        return self.path / SAMPLES

    @property
    def tensorboard_path(self) -> Path:
        return self.path / "tensorboard"

    @property
    def metrics_path(self) -> Path:
        return self.path / METRICS

    @property
    def eval_path(self) -> Path:
        return self.path / EVAL

    def rewind(self, step: int, evaluated: int | None = None) -> None:
        """Forget metrics, evaluations, samples and events beyond `step`, the step of the checkpoint that training resumes from.

        Call it before `sink`.

        Args:
            evaluated: step of the last evaluation that the checkpoint knows of (-1: none), where an evaluation may come after
                the checkpoint of its step; None: it never does.
        """
        truncate_after(self.metrics_path, step)
        truncate_after(self.eval_path, step if evaluated is None else evaluated)
        truncate_after(self.samples_path, step)
        truncate_after(self.path / EVENTS, step)
        self._resume_step = step

    def sink(self, *, tensorboard: bool = True, wandb_project: str = "") -> MetricSink:
        """The run's metric sink: JSONL, and TensorBoard and Weights & Biases as asked."""
        sinks: list[MetricSink] = [JsonlSink(self.metrics_path, resume_step=self._resume_step)]
        if tensorboard:
            sinks.append(TensorBoardSink(self.tensorboard_path, resume_step=self._resume_step))
        if wandb_project:
            config = json.loads((self.path / CONFIG).read_text())
            sinks.append(WandbSink(wandb_project, self.path.name, config, self.path))
        return TeeSink(sinks)

    def log_eval(self, step: int, returns: Sequence[float], **extra: float | int | str | list[float]) -> None:
        """Append an evaluation to eval.jsonl.

        Args:
            step: of the policy that was evaluated.
            returns: undiscounted return of each episode.
            extra: more keys, for example `lengths` or `wall_s`.
        """
        values = [float(value) for value in returns]
        mean = math.fsum(values) / len(values) if values else math.nan
        trim_partial_line(self.eval_path)
        with self.eval_path.open("a") as file:
            file.write(json_line({"step": int(step), "mean": mean, "returns": values, **extra}))

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append plain values to samples.jsonl, a line each."""
        trim_partial_line(self.samples_path)
        with self.samples_path.open("a") as file:
            file.writelines(json_line({"step": int(step), **sample}) for sample in samples)

    def log_event(self, step: int, kind: str, text: str) -> None:
        """Append what happened to events.jsonl."""
        path = self.path / EVENTS
        trim_partial_line(path)
        with path.open("a") as file:
            file.write(json_line({"step": int(step), "event": kind, "text": text}))

    def write_passport(self, facts: Mapping[str, Any]) -> None:
        """All that identifies the run in one file: its config and versions, and these facts."""
        config, versions = (json.loads((self.path / name).read_text()) for name in (CONFIG, VERSIONS))
        _write_json(self.path / PASSPORT, {**config, "versions": versions, **facts})

    def finish(self, status: RunState = RunState.FINISHED, error: str = "") -> None:
        """Write how the run ended and give the lock back. A second call does nothing."""
        if self._status.status != RunState.RUNNING:
            return
        wall_seconds = round(self._wall_before + time.monotonic() - self._opened, 3)
        ended = {**asdict(self._status), "status": status, "stopped": _now(), "wall_seconds": wall_seconds}
        self._write_status(RunStatus(**{**ended, "error": error}))
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, Exception) and not isinstance(error, StoppedError):
            self.finish(RunState.FAILED, f"{type(error).__name__}: {error}")
        else:
            self.finish(RunState.KILLED, type(error).__name__)

    def _write_status(self, status: RunStatus) -> None:
        self._status = status
        _write_json(self.path / RUN, asdict(status))


def read_status(path: Path) -> RunStatus:
    """run.json as written; wall seconds of a process that was killed are taken from the last file it wrote.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        status = RunStatus(**json.loads((path / RUN).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / RUN} is missing or damaged: {error}") from error
    if status.status != RunState.RUNNING:
        return status
    began = (path / RUN).stat().st_mtime  # written when this process took the run up
    touched = [file.stat().st_mtime for file in (path / METRICS, path / EVAL) if file.exists()]
    return RunStatus(
        **{**asdict(status), "wall_seconds": status.wall_seconds + max([0.0, *(t - began for t in touched)])}
    )


def _new_folder(root: Path, name: str) -> Path:
    number = 1
    while True:
        path = root / (name if number == 1 else f"{name}-{number}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path
        except FileExistsError as error:
            if not root.is_dir():
                raise ConfigError(f"runs cannot be written to {root}: it is a file; choose another folder") from error
            number += 1
        except OSError as error:
            raise ConfigError(f"runs cannot be written to {root}: {error}; choose another folder") from error


def _write_json(path: Path, document: Any) -> None:
    scratch = path.with_name(path.name + ".writing")
    scratch.write_text(json.dumps(document, indent=2) + "\n")
    os.replace(scratch, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
