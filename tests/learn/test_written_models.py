"""The model that a run writes with its checkpoints: what a full disk, a kill and a missing evaluation do to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lockstep.core.errors import ConfigError
from lockstep.learn.session import Session, UpdatesConfig
from lockstep.runs.directory import RunDirectory


class Disk:
    """Writes folders until it is full."""

    def __init__(self) -> None:
        self.is_full = False
        self.facts: list[dict[str, Any]] = []

    def write(self, path: Path, facts: Mapping[str, Any]) -> None:
        if self.is_full:
            raise ConfigError("the disk is full")
        path.mkdir(exist_ok=True)
        self.facts.append(dict(facts))


def begin(directory: RunDirectory, disk: Disk, *, resume: bool = False) -> Session:
    session = Session(UpdatesConfig(total_steps=3, checkpoint_every=1), directory=directory, resume=resume)
    session.begin({}, disk.write)
    return session


def update(session: Session) -> None:
    session.advance({})
    session.checkpoint()


def test_a_disk_that_is_full_for_a_while_ends_no_run(tmp_path: Path) -> None:
    directory, disk = RunDirectory.create(tmp_path, "full", UpdatesConfig(), 0), Disk()
    with directory, begin(directory, disk) as session:
        update(session)
        disk.is_full = True
        update(session)
        (event,) = map(json.loads, (directory.path / "events.jsonl").read_text().splitlines())
        assert "the model of step 2 is not written: the disk is full" in event["text"]
        with pytest.raises(ConfigError, match="the disk is full"):
            update(session)
        disk.is_full = False
        session.finish()
    assert [facts["steps"] for facts in disk.facts] == [1, 3]


def test_a_kill_before_the_model_was_written_is_made_good(tmp_path: Path) -> None:
    directory, disk = RunDirectory.create(tmp_path, "killed", UpdatesConfig(), 0), Disk()
    with directory, begin(directory, disk) as session:
        update(session)
    directory.model_path.rmdir()
    again = RunDirectory.open(directory.path)
    with again, begin(again, disk, resume=True):
        assert again.model_path.is_dir()
    assert [facts["steps"] for facts in disk.facts] == [1, 1]
