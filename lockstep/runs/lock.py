"""One writing process for a run directory.

The kernel's advisory lock is what decides: it vanishes with the process that holds it, so a killed run leaves no stale
lock. The process id in the file is only for the message.
"""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from pathlib import Path

from lockstep.core.errors import CheckpointError

# A reader that asks whether a run is live holds the lock for microseconds; a starter waits that long.
_PATIENCE_S = 0.25


class RunLock:
    """Held from construction until `release` or the end of the process.

    Raises:
        CheckpointError: another process, or another object of this one, holds it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
                    os.close(self._descriptor)
                    self._descriptor = -1
                    raise CheckpointError(
                        f"{path.parent} is in use by process {holder}; wait for it to end, stop it, or start a new run"
                    ) from None
                time.sleep(0.01)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())
        # A forked child (a vectoriser's worker) shares the descriptor and would keep the lock after this process died.
        held = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(held))

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_locked(path: Path) -> bool:
    """True if a live process holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _forget(held: weakref.ref[RunLock]) -> None:
    lock = held()
    if lock is not None:
        lock.release()
