"""The reading side of run directories: never takes the lock, never writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.core.errors import CheckpointError, unknown_name
from lockstep.runs.directory import CONFIG, EVAL, EVENTS, LOCK, METRICS, VERSIONS, RunState, RunStatus, read_status
from lockstep.runs.jsonl import last_record, read_jsonl
from lockstep.runs.lock import is_locked


@dataclass(frozen=True)
class EvalRecord:
    """One line of eval.jsonl: the policy of `step` and the undiscounted return of each episode."""

    step: int
    returns: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean return, NaN without episodes."""
        return sum(self.returns) / len(self.returns) if self.returns else float("nan")


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says. `state` is KILLED where run.json says running but no process holds the lock."""

    path: Path
    recipe: str
    seed: int
    config: dict[str, Any]
    status: RunStatus
    state: RunState

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def env_id(self) -> str:
        """Environment of the config, from `env.id`, `env` or `env_id`, or its task's name; "" if the config has none."""
        task = self.config.get("task")
        if isinstance(task, dict):
            return str(task.get("name", ""))
        env = self.config.get("env", self.config.get("env_id", ""))
        return str(env.get("id", "")) if isinstance(env, dict) else str(env)

    @property
    def num_steps(self) -> int:
        """Last step that was logged, 0 before the first."""
        last = last_record(self.path / METRICS)
        return int(last["step"]) if last else 0

    def versions(self) -> dict[str, Any]:
        """Content of versions.json."""
        return _read_object(self.path / VERSIONS)

    def evaluations(self) -> list[EvalRecord]:
        """All evaluations, oldest first. An episode whose return was not finite counts as NaN."""
        return [_evaluation(self.path / EVAL, record) for record in read_jsonl(self.path / EVAL)]

    def last_evaluation(self) -> EvalRecord | None:
        """The newest evaluation, None if there is none."""
        record = last_record(self.path / EVAL)
        return _evaluation(self.path / EVAL, record) if record else None

    def events(self) -> list[tuple[int, str]]:
        """(step, what happened), oldest first."""
        return [(int(record["step"]), str(record["text"])) for record in read_jsonl(self.path / EVENTS)]

    def metric_names(self) -> list[str]:
        """Names in metrics.jsonl in order of appearance."""
        names: dict[str, None] = {}
        for record in read_jsonl(self.path / METRICS):
            names.update(dict.fromkeys(record))
        return [name for name in names if name not in ("step", "wall_s")]

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric, without the steps at which it has no finite value.

        Raises:
            CheckpointError: no record has this metric; the message suggests the nearest name.
        """
        records = read_jsonl(self.path / METRICS)
        if records and not any(metric in record for record in records):
            raise CheckpointError(f"{self.path}: {unknown_name('metric', metric, self.metric_names())}")
        pairs = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
        return [step for step, _ in pairs], [float(value) for _, value in pairs]


@dataclass(frozen=True)
class DamagedRun:
    """A folder among the runs that cannot be read as one, and why."""

    path: Path
    reason: str


def read_run(path: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        CheckpointError: a file is missing or damaged; names it.
    """
    path = Path(path)
    document = _read_object(path / CONFIG)
    status = read_status(path)
    try:
        state = RunState(status.status)
        recipe, seed, config = str(document["recipe"]), int(document["seed"]), document["config"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG} or run.json is damaged: {error!r}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG} is damaged: `config` is {config!r}, expected an object")
    if state is RunState.RUNNING and not is_locked(path / LOCK):
        state = RunState.KILLED
    return RunRecord(path, recipe, seed, config, status, state)


def list_run_folders(root: Path) -> list[RunRecord | DamagedRun]:
    """All runs under `root`, by name; folders that are not readable as a run are named, not skipped.

    Raises:
        CheckpointError: `root` is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise CheckpointError(f"no folder {root}; train first, or name the folder of the runs with --root")
    found: list[RunRecord | DamagedRun] = []
    for path in sorted(root.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        try:
            record = read_run(path)
            last_record(path / METRICS), record.last_evaluation()
            found.append(record)
        except (CheckpointError, OSError) as error:
            found.append(DamagedRun(path, str(error)))
    return found


def find_run(root: Path, name: str) -> Path:
    """Path of a run given by path, by name under `root`, or by the unambiguous beginning of its name.

    Raises:
        CheckpointError: none or several match.
    """
    for path in (Path(name), Path(root) / name):
        if (path / CONFIG).is_file():
            return path
    names: Sequence[str] = sorted(path.name for path in Path(root).glob("*/") if (path / CONFIG).is_file())
    matches = [known for known in names if known.startswith(name)]
    if len(matches) == 1:
        return Path(root) / matches[0]
    if matches:
        raise CheckpointError(f"{name!r} is the beginning of several runs: {', '.join(matches)}; write more of it")
    raise CheckpointError(f"in {root}: {unknown_name('run', name, names)}")


def _evaluation(path: Path, record: dict[str, Any]) -> EvalRecord:
    try:
        returns = tuple(float("nan") if value is None else float(value) for value in record["returns"])
        return EvalRecord(int(record["step"]), returns)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r} in {str(record)[:80]}") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object")
    return document
