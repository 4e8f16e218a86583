"""SIGKILL at random moments: the resumed run ends with the curve and the weights of the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lockstep.models.control.folder import load_policy

CASES = {
    "ppo-cartpole": ["--run.total-steps", "30000", "--run.checkpoint-every", "1500", "--run.eval-every", "10000"],
    "ppo-pendulum": ["--run.total-steps", "24576", "--run.checkpoint-every", "4096", "--normalise-obs"],
    "dqn-cartpole": ["--run.total-steps", "8000", "--run.checkpoint-every", "700"],
}
TIMES = ("wall_s", "steps_per_s", "train_s")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lockstep.cli.main", "train", *arguments]


def _run_whole(root: Path, recipe: str) -> Path:
    arguments = [recipe, *CASES[recipe], "--run.final-episodes", "5", "--out", str(root)]
    subprocess.run(_command(*arguments), check=True, capture_output=True, timeout=300)
    return next(root.iterdir())


def _run_with_kills(root: Path, recipe: str, num_kills: int, rng: random.Random) -> tuple[Path, int]:
    arguments = _command(recipe, *CASES[recipe], "--run.final-episodes", "5", "--out", str(root))
    kills = 0
    for _ in range(num_kills + 50):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kills < num_kills:
            # Start-up takes about two seconds; some kills fall into it, most into training.
            try:
                process.wait(timeout=rng.uniform(1.5, 4.5))
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        _, error = process.communicate(timeout=300)
        runs = list(root.iterdir()) if root.exists() else []
        if process.returncode == 0:
            return runs[0], kills
        assert process.returncode == -signal.SIGKILL, error
        if runs and (runs[0] / "run.json").exists():
            arguments = _command("--resume", str(runs[0]))
        time.sleep(0.05)
    raise AssertionError("the run never finished")


def _curve(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", CASES)
def test_killed_run_ends_like_the_whole_one(recipe: str, tmp_path: Path) -> None:
    whole = _run_whole(tmp_path / "whole", recipe)
    killed, kills = _run_with_kills(tmp_path / "killed", recipe, 6, random.Random(recipe))
    assert kills >= 2
    assert _curve(killed) == _curve(whole)
    assert load_policy(killed).digest() == load_policy(whole).digest()
    assert (killed / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
