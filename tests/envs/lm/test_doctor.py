"""The doctor tells a healthy task from one that would teach nothing, or the wrong thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.cli.doctor import main
from lockstep.core.errors import ConfigError
from lockstep.envs.lm.doctor import diagnose
from lockstep.envs.lm.find import find_task
from lockstep.envs.lm.records import RecordsTask
from tests.envs.lm.subjects import Subject

SUBJECTS = "tests.envs.lm.subjects"


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
    assert "reference" in [finding.what for finding in report.findings if finding.level == "warning"]


def test_the_command_looks_at_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gsm.jsonl"
    path.write_text('{"question": "6 * 7?", "answer": "#### 42"}\n')
    assert main([str(path), "--json", str(tmp_path / "report.json")]) == 0
    assert "1 of 1 score 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["task"] == "gsm"
    assert main([f"{SUBJECTS}:healthy"]) == 0
    assert isinstance(find_task(str(path)), RecordsTask)
    task = find_task(f"{SUBJECTS}:make")
    assert task.name == "subject-reference"
    for word in (f"{SUBJECTS}:nothing", "nothing", "no_module:x"):
        with pytest.raises(ConfigError):
            find_task(word)
