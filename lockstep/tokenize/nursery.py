"""Processes for grammars, one for each: the owner's side of `grammar_host`."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from queue import SimpleQueue
from typing import Any, Protocol, final

from lockstep.core.child_process import limit_waits
from lockstep.core.env import child_environment
from lockstep.core.errors import ConfigError, ServingError
from lockstep.core.extras import require
from lockstep.tokenize.grammar import GrammarSpec, ending_ids
from lockstep.tokenize.grammar_host import GONE, KILL, OPEN, Limits
from lockstep.tokenize.tokenizer import Tokenizer

END_S = 5.0
_Job = tuple[Any, ...]
"""(OPEN, number, spec, the host's end of its pipe) or (KILL, number)."""


class Host(Protocol):
    """A process that speaks as `grammar_host.serve` does."""

    pipe: Connection

    def close(self) -> None:
        """End it, whatever it does."""


class Hosts(Protocol):
    """Where hosts come from."""

    def open(self, spec: GrammarSpec) -> Host:
        """A new one. Returns at once; the process may begin later, or say that it cannot be had.

        Raises:
            ServingError: none can be had.
        """


@final
class Nursery:
    """Hosts of one tokenizer's grammars, forked from a process that has read the vocabulary once.

    It starts with the first host and ends with this object, or this process. A thread speaks with it, so that nobody who asks
    for a host waits for its start or for a full pipe.

    Args:
        num_logits: of the model.

    Raises:
        ConfigError: no eos, fewer logits than tokens, or a system whose processes cannot be forked.
        MissingExtraError: `llguidance` is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, num_logits: int, limits: Limits) -> None:
        require("llguidance", extra="grammar")
        ending_ids(tokenizer, num_logits)
        if os.name != "posix":
            raise ConfigError("structured output needs processes that can be forked, which this system does not have")
        self._described = tokenizer, num_logits, limits
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._numbers = itertools.count()
        self._has_thread = False

    def open(self, spec: GrammarSpec) -> Host:
        """See `Hosts`."""
        if not self._has_thread:
            self._has_thread = True
            threading.Thread(target=_keep, args=(self._described, self._jobs), name="nursery", daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)
        try:
            ours, theirs = Pipe()
        except OSError as error:
            raise ServingError(f"a process for the grammar cannot be had: {error}; try again later") from error
        limit_waits(ours.fileno())
        number = next(self._numbers)
        self._jobs.put((OPEN, number, spec, theirs))
        return _Process(ours, self._jobs, number)


@final
class _Process:
    def __init__(self, pipe: Connection, jobs: SimpleQueue[_Job | None], number: int) -> None:
        self.pipe = pipe
        self._jobs = jobs
        self._number = number

    def close(self) -> None:
        self.pipe.close()
        self._jobs.put((KILL, self._number))


def _keep(described: tuple[Tokenizer, int, Limits], jobs: SimpleQueue[_Job | None]) -> None:
    """The thread: starts a nursery, and another should it have ended, and passes on what is asked of it."""
    process: subprocess.Popen[bytes] | None = None
    control: Connection | None = None
    while (job := jobs.get()) is not None:
        word, number, *rest = job
        if word == KILL:
            if control is not None:
                with contextlib.suppress(OSError):  # gone with all its hosts
                    control.send((KILL, number))
            continue
        spec, theirs = rest
        try:
            if process is None or control is None or process.poll() is not None:
                _end(process, control)
                process = control = None
                process, control = _start(described)
            control.send((OPEN, number, spec))
            send_handle(control, theirs.fileno(), None)
        except (OSError, RuntimeError):
            with contextlib.suppress(OSError):
                theirs.send(GONE)
            _end(process, control)
            process = control = None
        theirs.close()
    _end(process, control)


def _start(described: tuple[Tokenizer, int, Limits]) -> tuple[subprocess.Popen[bytes], Connection]:
    control, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "lockstep.tokenize.grammar_host", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=child_environment(PYTHONPATH=os.pathsep.join(path or "." for path in sys.path)),
        )
    try:
        control.send(described)
        limit_waits(control.fileno())
    except OSError:
        _end(process, control)
        raise
    return process, control


def _end(process: subprocess.Popen[bytes] | None, control: Connection | None) -> None:
    if control is not None:
        control.close()
    if process is not None:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(END_S)
