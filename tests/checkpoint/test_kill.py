"""A process that does nothing but save is killed at random moments; what is on disk always loads, whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lockstep.checkpoint.store import Checkpointer
from lockstep.core.env import child_environment

NUM_KILLS = 10

# Forks: importing torch once and killing a forked child ten times takes a second, ten imports would take half a minute.
SAVER = """
import os, sys
from pathlib import Path
import torch
from lockstep.checkpoint.store import Checkpointer

torch.set_num_threads(1)
store = Checkpointer(Path(sys.argv[1]), keep_last=2)
while line := sys.stdin.readline():
    first = int(line)
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)
        for step in range(first, first + 10**6):
            big = torch.full((50_000,), step, dtype=torch.int64)
            state = {"step": step, "big": big, "parts": [torch.tensor(step)] * 3}
            store.save(step, state, score=float(step % 7))
            if step % 5 == 0:
                store.save(step, state, score=float(step % 7))
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def _seconds_per_save(folder: Path, reached: int) -> float:
    """Wait for two saves beyond `reached`; the time between them, so that kills fall into saves on any machine."""
    seen: list[float] = []
    deadline = time.monotonic() + 60
    for wanted in (reached + 1, reached + 2):
        while not any(path.name >= f"step_{wanted:012d}" for path in folder.glob("step_*")):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        seen.append(time.monotonic())
    return seen[1] - seen[0]


@pytest.mark.slow
def test_sigkill_at_random_moments_leaves_a_complete_state(tmp_path: Path) -> None:
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path / "checkpoints")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    assert saver.stdin is not None
    assert saver.stdout is not None
    said: list[str] = []
    store = Checkpointer(tmp_path / "checkpoints", report=said.append)
    rng = random.Random(0)
    reached, leftovers = -1, 0
    try:
        for _ in range(NUM_KILLS):
            print(reached + 1, file=saver.stdin, flush=True)
            pid = int(saver.stdout.readline())
            try:
                time.sleep(rng.uniform(0.0, 2.0) * _seconds_per_save(store.folder, reached))
            finally:
                os.kill(pid, signal.SIGKILL)
            assert saver.stdout.readline() == "dead\n"
            leftovers += any(path.name.startswith(".") for path in store.folder.iterdir())
            if store.latest() is None:
                assert reached == -1, "a checkpoint that was there has vanished"
                continue
            step, state = store.load()
            assert step >= reached
            assert state["step"] == step
            assert torch.equal(state["big"], torch.full((50_000,), step))
            assert [int(part) for part in state["parts"]] == [step] * 3
            reached = step
    finally:
        saver.stdin.close()
        saver.wait(timeout=20)
        saver.stdout.close()
    assert said == [], "a kill must not leave a damaged checkpoint under a valid name"
    assert reached > NUM_KILLS, "the process saved too little to prove anything"
    assert leftovers > 0, "no kill fell into a save"
