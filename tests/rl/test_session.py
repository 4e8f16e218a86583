"""What surrounds a loop: polite stops, divergence, failures that leave nothing behind."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import lockstep
from lockstep.core.errors import ConfigError, DivergedError, LockstepError, StoppedError
from lockstep.recipes import recipe
from lockstep.runs.record import read_run

TINY = {"total_steps": 2048, "log_every": 256, "final_episodes": 2, "eval_every": 0, "tensorboard": False}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_polite_stop_leaves_a_checkpoint_and_resumes(number: signal.Signals, tmp_path: Path) -> None:
    def stop(step: int, total: int, metrics: object) -> None:
        if step >= 512:
            os.kill(os.getpid(), number)

    with pytest.raises(StoppedError, match="--resume"):
        lockstep.train("ppo-cartpole", out=tmp_path, on_progress=stop, **TINY)
    path = next(tmp_path.iterdir())
    assert read_run(path).state == "killed"
    assert lockstep.load(path).version == read_run(path).num_steps  # a server of the run has its newest checkpoint
    resumed = lockstep.resume(path)
    whole = lockstep.train("ppo-cartpole", out=tmp_path / "whole", **TINY)
    assert resumed.policy.digest() == whole.policy.digest()
    assert signal.getsignal(number) is not stop


def test_divergence_is_an_error_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="not finite"):
        lockstep.train("ppo-cartpole", out=tmp_path, learning_rate=1e38, **TINY)
    assert not list(tmp_path.glob("*/policy"))
    assert not list(tmp_path.glob("*/checkpoints/step_*"))


@pytest.mark.parametrize(
    "change",
    [{"env__id": "Nothing-v0"}, {"gamma": 2.0}, {"total_steps": -5}, {"no_such_field": 1}, {"seed": 1, "hidden": 3}],
)
def test_a_config_that_cannot_run_leaves_no_directory(change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(LockstepError):
        lockstep.train("ppo-cartpole", out=tmp_path / "runs", **{**TINY, **change})
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_an_unwritable_folder_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        lockstep.train("ppo-cartpole", out="/proc/nowhere", **TINY)


def test_a_policy_folder_knows_its_environment(tmp_path: Path) -> None:
    run = lockstep.train("ppo-cartpole", out=tmp_path, **TINY)
    assert len(lockstep.evaluate(run.path / "policy", episodes=2).returns) == 2
    with pytest.raises(ConfigError, match="--env"):
        lockstep.evaluate(run.policy, episodes=2)


def test_config_object_trains(tmp_path: Path) -> None:
    config = recipe("ppo-cartpole")
    config = replace(config, run=replace(config.run, **TINY))
    assert lockstep.train(config, out=tmp_path).result.steps == 2048
