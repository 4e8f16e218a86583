"""`lockstep bench language`: seeds of a tiny recipe and a variation of it, a file that is completed, a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.cli import bench_language
from lockstep.cli.main import main
from lockstep.core.errors import ConfigError
from tests.rl.lm.small import config


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    wish = config(run__total_steps=2, run__eval_every=1, evaluation__samples=2, evaluation__temperature=1.0)
    monkeypatch.setattr(bench_language, "recipe", lambda name: wish)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_seeds_and_variations_are_trained_once_and_drawn(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes, file, picture = ("one", "one+learn.exact=false"), tiny / "figures.json", tiny / "curves.png"
    line = ["bench", "language", "--recipes", *recipes, "--json", str(file), "--plot", str(picture)]
    assert main([*line, "--seeds", "1"]) == 0
    assert main([*line, "--seeds", "2"]) == 0
    told = capsys.readouterr().out
    assert told.count("seed 1:") == told.count("seed 2:") == 2
    figures = json.loads(file.read_text())
    assert set(figures["runs"]) == set(recipes)
    for runs in figures["runs"].values():
        assert [run["seed"] for run in runs] == [1, 2]
        assert all(
            run["steps"] == [0, 1, 2] and len(run["scores"]) == 3 and run["greedy"][0] is not None for run in runs
        )
    # Exactness costs no randomness: the same samples, the same updates.
    assert figures["runs"]["one"][0]["scores"] == figures["runs"]["one+learn.exact=false"][0]["scores"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_varied_is_said() -> None:
    assert bench_language.varied("one+run.seed=7").run.seed == 7
    with pytest.raises(ConfigError, match="not of the form"):
        bench_language.varied("one+exact")
    with pytest.raises(ConfigError, match="did you mean"):
        bench_language.varied("one+learn.exat=false")
