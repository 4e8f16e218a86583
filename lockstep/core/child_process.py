"""A child process that its owner can always end, and that ends with its owner.

    owner                                          child (own session, killed as a group)
    -----                                          --------------------------------------
    ChildProcess(context, target, arguments)  -->  target(pipe, *arguments), which calls `settle` first
    each message: within `STUCK_S`, or an OSError  reads the pipe; at its end, or with the owner's (Linux), so does it
    kill: the child and all that it started

Children come from `fresh_context`: a fork would copy a process whose threads may hold locks.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STUCK_S = 30.0
"""How long a child may leave a full pipe unread, or a message half written."""
MAX_DETAIL = 2000
_PDEATHSIG = 1


_PRELOADED: dict[str, None] = {}


def fresh_context(*modules: str) -> Any:
    """Of multiprocessing: children that begin with nothing of this process but what they are given.

    Args:
        modules: which children find imported, those of every context: the server that they are forked from imports them
            once, if this is called before its first child starts. None may start a thread when it is imported.
    """
    context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    _PRELOADED.update(dict.fromkeys(modules))
    if os.name == "posix" and modules:
        context.set_forkserver_preload(list(_PRELOADED))
    return context


def settle(memory_bytes: int = 0) -> None:
    """The first call of a child: own session, end with the owner, quiet, limited.

    Args:
        memory_bytes: limit of its address space beyond what it begins with; 0 for none.
    """
    if os.name == "posix":
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if memory_bytes:
            import resource

            memory_bytes += _address_space()
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            if hard != resource.RLIM_INFINITY:
                memory_bytes = min(memory_bytes, hard)
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)


def _address_space() -> int:
    """Bytes that this process has mapped, among them what its server had imported; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class ChildProcess:
    """The owner's side.

    Args:
        context: `fresh_context()`.
        target: a function of a module, called with the child's end of the pipe and the arguments.
        arguments: travel by pickle.
    """

    def __init__(self, context: Any, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.pipe, theirs = context.Pipe()
        limit_waits(self.pipe.fileno())
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid  # type: ignore[no-any-return]

    def kill(self, *, grace_s: float = 0.0) -> str:
        """End it and all that it started; how it ended.

        Args:
            grace_s: time for a child that is ending by itself, so that its own exit status is seen.
        """
        process = self._process
        process.join(grace_s)
        code = process.exitcode
        if os.name == "posix" and process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of it
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join(5.0)
        self.pipe.close()
        return _ending(code if code is not None else process.exitcode)


def describe(error: BaseException) -> str:
    """The exception and where it was raised, within `MAX_DETAIL` characters.

    >>> describe(ValueError("no answer"))
    'ValueError: no answer'
    """
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f" ({os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno})" if frame is not None else ""
    try:
        text = str(error)
    except Exception as broken:
        text = f"its message cannot be written ({type(broken).__name__})"
    return f"{type(error).__name__}: {text[:MAX_DETAIL]}{place}"


def limit_waits(handle: int) -> None:
    """A write to a child that reads no more, and a read of what it does not finish, fail instead of waiting for ever."""
    if os.name == "posix":
        limit = struct.pack("@ll", int(STUCK_S), int(STUCK_S % 1 * 1e6))
        with socket.socket(fileno=os.dup(handle)) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        names = {member.value: member.name for member in signal.Signals}
        return f"killed by {names.get(-code, f'signal {-code}')}"
    return f"exit status {code}"
