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
    "ppo-cartpole-zoo": ["--run.total-steps", "32768", "--run.checkpoint-every", "2048", "--run.eval-every", "12000"],
    "ppo-pendulum": ["--run.total-steps", "20480", "--run.checkpoint-every", "4096", "--normalise-obs"],
    "dqn-cartpole": ["--run.total-steps", "4000", "--run.checkpoint-every", "500"],
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
        seconds = _seconds_per_line(root, process) if kills < num_kills else None
        if seconds is not None:
            time.sleep(rng.uniform(0.0, 1.0) * seconds)
            if process.poll() is None:
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


def _seconds_per_line(root: Path, process: subprocess.Popen[str]) -> float | None:
    """Wait for two new metric lines; the time between them, or None if the run ended first. What is slept after that is
    a share of it, so that kills fall into training however fast or slow the machine is."""
    before, seen = _num_lines(root), []
    deadline = time.monotonic() + 120
    for wanted in (before + 1, before + 2):
        while _num_lines(root) < wanted:
            assert time.monotonic() < deadline
            if process.poll() is not None:
                return None
            time.sleep(0.002)
        seen.append(time.monotonic())
    return seen[1] - seen[0]


def _num_lines(root: Path) -> int:
    return sum(path.read_text().count("\n") for path in root.glob("*/metrics.jsonl"))


def _curve(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", CASES)
def test_killed_run_ends_like_the_whole_one(recipe: str, tmp_path: Path) -> None:
    whole = _run_whole(tmp_path / "whole", recipe)
    killed, kills = _run_with_kills(tmp_path / "killed", recipe, 2, random.Random(recipe))
    assert kills == 2
    assert _curve(killed) == _curve(whole)
    assert load_policy(killed).digest() == load_policy(whole).digest()
    assert (killed / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
