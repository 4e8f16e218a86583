"""The doctor tells a healthy task from one that would teach nothing, or the wrong thing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli.doctor import main
from lockstep.core.errors import ConfigError
from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.doctor import diagnose
from lockstep.envs.lm.find import find_task
from lockstep.envs.lm.records import RecordsTask
from lockstep.envs.lm.task import Task


class Subject(Task):
    """A task with one chosen fault."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    @property
    def name(self) -> str:
        return f"subject-{self.fault}"

    @property
    def num_problems(self) -> int | None:
        return 3

    def problem(self, index: int) -> Problem:
        salt = random.random() if self.fault == "same again" else 0
        return Problem(index=index, prompt=f"{index} {salt}", answer="" if self.fault == "none" else f"a{index}")

    def score(self, problem: Problem, text: str) -> Score:
        if self.fault == "raises" and not text.startswith("a"):
            raise ValueError("cannot read")
        if self.fault == "generous":
            return Score.of(1.0)
        return Score.of(float(text == problem.answer and self.fault != "reference"))


@pytest.mark.parametrize(
    ("fault", "what", "words"),
    [
        ("", "", ""),
        ("reference", "reference", "3 of 3 score below 1: 'a0' gets 0"),
        ("generous", "garbage", "9 of 9 score 1 or more"),
        ("raises", "garbage", "raises at 9 of 9, such as '': ValueError: cannot read"),
        ("same again", "same again", "could not be resumed"),
    ],
)
def test_faults_are_found(fault: str, what: str, words: str) -> None:
    report = diagnose(Subject(fault))
    assert report.is_healthy == (not fault)
    assert [finding.what for finding in report.findings if finding.level == "problem"] == ([what] if fault else [])
    assert words in str(report)


def test_a_task_without_answers_is_a_warning() -> None:
    report = diagnose(Subject("none"), num_problems=2)
    assert [finding.what for finding in report.findings if finding.level == "warning"] == ["reference"]


healthy = Subject()
nothing = 3


def make() -> Any:
    return Subject("reference")


def test_the_command_looks_at_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gsm.jsonl"
    path.write_text('{"question": "6 * 7?", "answer": "#### 42"}\n')
    assert main([str(path), "--json", str(tmp_path / "report.json")]) == 0
    assert "1 of 1 score 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["task"] == "gsm"
    assert main([f"{__name__}:healthy"]) == 0
    assert isinstance(find_task(str(path)), RecordsTask)
    task = find_task(f"{__name__}:make")
    assert task.name == "subject-reference"
    for word in (f"{__name__}:nothing", "nothing", "no_module:x"):
        with pytest.raises(ConfigError):
            find_task(word)
