"""A child that stops in the middle of a message holds nobody up, and can be ended."""

from __future__ import annotations

import os
import struct
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
