"""`lockstep bench scores`: tables from figures that are already there; no test trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli.main import main
from lockstep.runs.versions import describe_versions


def figures(commit: str | None) -> dict[str, Any]:
    def runs(*means: float) -> list[dict[str, Any]]:
        facts = {"std": 1.0, "steps": 20_480, "wall_seconds": 2.0, "solve": 1}
        return [{"seed": i, "mean": mean, "train_seconds": float(i), **facts} for i, mean in enumerate(means, 1)]

    return {
        "versions": {"commit": commit},
        "solve": {"ppo-cartpole": runs(500.0, 400.0, 480.0), "ppo-of-old": runs(7.0)},
        "scores": {"ppo-pendulum": runs(-150.0, -170.0), "ppo-minatar-breakout": []},
    }


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_a_file_of_any_commit_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(figures("0123abcd")))
    assert main(["bench", "scores", "--show", str(path)]) == 0
    out = capsys.readouterr().out
    table = rows(out)
    assert table[0] == ["ppo-cartpole", "2/3 >= 475", "20,480", "1.00", "2.00", "3.00", "median < 1 s"]
    assert table[1][:2] == ["ppo-of-old", "-"]
    assert table[2][:4] == ["ppo-pendulum", "2", "20,480", "-160.0"]
    assert len(table) == 3
    assert "0123abcd" in out


def test_completed_figures_of_this_commit_end_in_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(figures(describe_versions()["commit"])))
    wish = ["--recipes", "ppo-pendulum", "--solve", "ppo-cartpole", "--seeds", "2", "--json", str(path)]
    assert main(["bench", "scores", *wish]) == 0
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["ppo-cartpole", "ppo-pendulum"]


@pytest.mark.parametrize(
    "text", [None, "{}", "[1]", '{"solve": {"x": [{}]}, "scores": {}, "versions": {"commit": ""}}']
)
def test_other_files_are_refused(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    if text is not None:
        path.write_text(text)
    assert main(["bench", "scores", "--show", str(path)]) == 2
    assert "cannot be read as figures" in capsys.readouterr().err
