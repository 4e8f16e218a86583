"""`lockstep doctor` on environments and recipes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.cli.doctor import measure_training
from lockstep.cli.main import main
from lockstep.envs.lm import doctor as task_doctor
from lockstep.envs.lm.verify import VerifierPool
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


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge in this process, without the seconds that a worker takes to start."""
    monkeypatch.setattr(task_doctor, "VerifierPool", lambda config: VerifierPool(replace(config, workers=0)))


@pytest.mark.usefixtures("here")
def test_a_language_recipe_takes_the_overrides_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "doctor.json"
    line = ["doctor", "grpo-task", "--task.name", "tests.rl.lm.digits:Digits", "--json", str(out)]
    assert main(line) == 1
    found = capsys.readouterr().out
    assert "20 of 20 score 1" in found
    assert "16 of 60 score 1 or more" in found  # the digit asked for, among others
    assert json.loads(out.read_text())["task"] == "digits"
    assert main(["doctor", "grpo-task", "--task.name", "tests.rl.lm.digits:Moody"]) == 1
    assert "ValueError: not in the mood" in capsys.readouterr().out
    assert main([*line, "--rollout.group-size", "1"]) == 2
    assert "compares a sample with its group's others" in capsys.readouterr().err
    assert main(["doctor", "sft-jsonl"]) == 2
    assert "learns from a file" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_episodes_are_played_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "tests.rl.lm.test_turns:Talks"]) == 0
    found = capsys.readouterr().out
    assert "8 of 8 episodes are over after 3 turns at most" in found
    assert "8 episodes are a function of their texts" in found
    assert (
        main(["doctor", "grpo-task", "--task.name", "tests.rl.lm.test_turns:Unlike", "--verifier.timeout-s", "0.2"])
        == 1
    )
    found = capsys.readouterr().out
    assert "1 of 8 end without a reward; episode 0 raises after ['']: KeyError" in found
    assert "episodes [1, 2, 3, 4, 5] answer the same texts otherwise" in found


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
