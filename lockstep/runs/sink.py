"""Where a training loop's numbers go. A loop knows `MetricSink` and nothing of files, dashboards or services."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError
from lockstep.core.extras import require
from lockstep.runs.events import EventFile
from lockstep.runs.jsonl import json_line, last_record, trim_partial_line, truncate_after

RESERVED = ("step", "wall_s")


class MetricSink(ABC):
    """Takes named scalars by step.

    `log` may be called with any set of names each time; steps do not decrease. Values that are not finite are kept as
    "no value" where the medium cannot hold them, never dropped. After `flush`, a kill of the process loses nothing that
    was logged before. `close` flushes; calling it twice is fine; logging afterwards is an error.
    """

    @abstractmethod
    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record `metrics` (name -> value convertible to float) at `step`."""

    @abstractmethod
    def flush(self) -> None:
        """Hand everything logged to the operating system or service."""

    @abstractmethod
    def close(self) -> None:
        """Flush and release the medium."""


class JsonlSink(MetricSink):
    """One line a call: {"step", "wall_s", name: value...}. Each line reaches the operating system before `log` returns.

    Args:
        path: appended to; `wall_s` goes on from its last line.
        resume_step: on resume, lines beyond this step are dropped first, so that the file equals that of a run which
            was never interrupted (but for `wall_s`).
        clock: seconds, monotonic.
    """

    def __init__(
        self, path: Path, *, resume_step: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            truncate_after(path, resume_step)
        trim_partial_line(path)
        last = last_record(path)
        self._clock = clock
        self._start = clock() - (float(last.get("wall_s", 0.0)) if last else 0.0)
        self._file = path.open("a")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        _check_names(metrics)
        record: dict[str, Any] = {"step": int(step), "wall_s": round(self._clock() - self._start, 4)}
        for name, value in metrics.items():
            record[name] = float(value)
        self._file.write(json_line(record))
        self._file.flush()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink(MetricSink):
    """Scalars as TensorBoard event files.

    Args:
        folder: of the event files; a new file is started.
        resume_step: on resume, TensorBoard is told to forget what other files say beyond this step.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        self._file = EventFile(folder, purge_step=None if resume_step is None else resume_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._file.scalars(int(step), {name: float(value) for name, value in metrics.items()})

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandbSink(MetricSink):
    """Weights & Biases, through the extra `wandb`.

    Args:
        project: of the service.
        name: of the run.
        config: resolved configuration, as JSON values.
        folder: for the client's local files.

    The client's own settings say whether it sends (`WANDB_MODE=offline` keeps the files in `folder`).

    Raises:
        ConfigError: the client could not begin: no key, no network, a project that it refuses.
    """

    def __init__(self, project: str, name: str, config: dict[str, Any], folder: Path) -> None:
        wandb: Any = require("wandb", extra="wandb")
        self._closed = False
        try:
            self._run = wandb.init(project=project, name=name, id=name, config=config, dir=str(folder), resume="allow")
        except wandb.Error as error:
            raise ConfigError(
                f"wandb_project={project!r}: Weights & Biases could not begin: {error}; run `wandb login`, set "
                "WANDB_MODE=offline, or leave wandb_project empty"
            ) from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._closed:
            raise ValueError("log() on a closed WandbSink")
        self._run.log({name: float(value) for name, value in metrics.items()}, step=int(step))

    def flush(self) -> None:
        """The client's own process sends in the background."""

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._run.finish()


class MemorySink(MetricSink):
    """Keeps (step, metrics) pairs in `records`, for tests and notebooks.

    >>> sink = MemorySink()
    >>> sink.log(8, {"loss": 0.5})
    >>> sink.records
    [(8, {'loss': 0.5})]
    """

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.closed:
            raise ValueError("log() on a closed MemorySink")
        self.records.append((int(step), {name: float(value) for name, value in metrics.items()}))

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self.closed = True

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric."""
        pairs = [(step, metrics[name]) for step, metrics in self.records if name in metrics]
        return [step for step, _ in pairs], [value for _, value in pairs]


class TeeSink(MetricSink):
    """Passes everything on to several sinks, in order."""

    def __init__(self, sinks: Iterable[MetricSink]) -> None:
        self.sinks = tuple(sinks)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, metrics)

    def flush(self) -> None:
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def _check_names(metrics: dict[str, float]) -> None:
    for name in RESERVED:
        if name in metrics:
            raise ConfigError(f"metric name {name!r} is the sink's own; log it under another name")
