"""A child that stops in the middle of a message holds nobody up, and can be ended."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import pytest

from lockstep.core import child_process
from lockstep.core.child_process import ChildProcess, fresh_context, settle


def stubborn(pipe: Connection) -> None:
    """Begins a message of a thousand bytes, and sleeps over it and over all that it is sent."""
    settle()
    os.write(pipe.fileno(), struct.pack("!i", 1000))
    time.sleep(60)


def test_no_wait_for_a_child_is_without_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "STUCK_S", 0.2)
    child = ChildProcess(fresh_context(), stubborn, ())
    try:
        assert child.pipe.poll(30)
        began = time.monotonic()
        with pytest.raises(BlockingIOError):
            child.pipe.recv_bytes()
        with pytest.raises(BlockingIOError):
            child.pipe.send_bytes(bytes(1 << 24))
        assert time.monotonic() - began < 20
    finally:
        ending = child.kill()
    assert ending == "killed by SIGKILL"


def imported(pipe: Connection) -> None:
    """Tells what it begins with, and how much more it can map."""
    found = [name for name in ("lockstep.envs.lm.worker", "lockstep.rl.lm.worker") if name in sys.modules]
    threads = len(os.listdir("/proc/self/task"))
    settle(256 << 20)
    sizes = [200 << 20, 300 << 20]
    got = []
    for size in sizes:
        try:
            mmap.mmap(-1, size).close()
            got.append(size)
        except OSError:
            pass
    pipe.send((found, threads, got == sizes[:1]))


OWNER = """
from lockstep.core.child_process import ChildProcess, fresh_context
from tests.core.test_child_process import imported
fresh_context("lockstep.rl.lm.worker")
child = ChildProcess(fresh_context("lockstep.envs.lm.worker"), imported, ())
assert child.pipe.poll(60)
print(child.pipe.recv())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_find_modules_imported_and_their_memory_is_beside_that() -> None:
    done = subprocess.run([sys.executable, "-c", OWNER], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "(['lockstep.envs.lm.worker', 'lockstep.rl.lm.worker'], 1, True)", done.stderr
