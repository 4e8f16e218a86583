"""`lockstep doctor` on environments and recipes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.cli.doctor import measure_training
from lockstep.cli.main import main
from lockstep.recipes import recipe


def test_recipe_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "doctor.json"
    assert main(["doctor", "ppo-cartpole", "--seconds", "0.02", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "vectoriser='auto' takes" in text
    assert "Recipe ppo-cartpole: " in text
    document = json.loads(out.read_text())
    timed = document["recipe"]
    assert timed["total_steps"] == recipe("ppo-cartpole").run.total_steps
    assert timed["seconds"] == pytest.approx(timed["total_steps"] * timed["total_us"] * 1e-6)
    assert 0 < timed["env_us"] <= timed["total_us"]
    assert {rate["form"] for rate in document["rates"]} >= {"sync"}


def test_recipe_without_its_data_is_still_diagnosed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "bc-npz", "--seconds", "0.02"]) == 0
    assert "the learner was not measured" in capsys.readouterr().out


def test_mistyped_recipe_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "ppo-cartpol"]) == 2
    assert "'ppo-cartpole'" in capsys.readouterr().err


ENVIRONMENT = """
import gymnasium as gym


class Still(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.low, {}

    def step(self, action):
        return self.observation_space.low, 0.0, False, True, {}
"""


def test_environment_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "still_env.py").write_text(ENVIRONMENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert main(["doctor", "still_env:Still", "--num-envs", "2", "--seconds", "0.01"]) == 0
    assert "no reward in" in capsys.readouterr().out


def test_unwritable_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "CartPole-v1", "--seconds", "0.01", "--json", str(tmp_path / "no" / "f.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn-cartpole", "tqc-pendulum", "a2c-cartpole"])
def test_more_work_takes_longer(name: str) -> None:
    """Every kind of learner is measured, and a network of 256 units costs more than one of 16."""
    config = recipe(name)
    times = [
        # The best of three in turns: what other processes take hits single measurements.
        min(
            measure_training(replace(config, network=replace(config.network, hidden_sizes=sizes)), seconds=0.1)
            for _ in range(3)
        )
        for sizes in ((16,), (256, 256))
    ]
    assert times[1] > times[0]
