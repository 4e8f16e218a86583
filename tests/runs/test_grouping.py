"""Runs that differ only in seed are one group; labels say what differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lockstep.runs.directory import RunDirectory
from lockstep.runs.grouping import differing, flatten, group_runs
from lockstep.runs.record import read_run


@dataclasses.dataclass(frozen=True)
class RunConfig:
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 0.1
    run: RunConfig = RunConfig()


def test_groups_and_labels(tmp_path: Path) -> None:
    paths = []
    for name, lr, seed in (("ppo", 0.1, 0), ("ppo", 0.1, 1), ("ppo", 0.2, 0), ("dqn", 0.3, 0)):
        with RunDirectory.create(tmp_path, name, Config(lr, RunConfig(seed)), seed) as run:
            run.log_eval(1, [lr * 10, lr * 30])
        paths.append(run.path)
    groups = group_runs(read_run(path) for path in paths)
    assert [(g.label, len(g.runs)) for g in groups] == [("ppo lr=0.1", 2), ("ppo lr=0.2", 1), ("dqn", 1)]
    assert groups[0].scores() == [2.0, 2.0]
    interval = groups[0].interval()
    assert interval is not None
    assert interval.estimate == 2.0


def test_differing_tells_missing_from_none() -> None:
    assert differing([{"a": 1, "b": None}, {"a": 1}]) == ["b"]
    assert differing([{"a": 1}]) == []
    nested = {"a": {}, "b": {"c": [1], "stop": {"float": "inf"}}}
    assert flatten(nested) == {"a": {}, "b.c": [1], "b.stop": float("inf")}
