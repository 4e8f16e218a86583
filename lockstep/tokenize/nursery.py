"""Processes for grammars, one for each: the owner's side of `grammar_host`."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Protocol, final

from lockstep.core.env import child_environment
from lockstep.core.errors import ServingError
from lockstep.core.extras import require
from lockstep.tokenize.grammar import ending_ids
from lockstep.tokenize.grammar_host import KILL, OPEN, Limits
from lockstep.tokenize.tokenizer import Tokenizer

END_S = 5.0


class Host(Protocol):
    """A process that waits for its spec, then speaks as `grammar_host.serve` does."""

    pipe: Connection

    def close(self) -> None:
        """End it, whatever it does."""


class Hosts(Protocol):
    """Where hosts come from."""

    def open(self) -> Host:
        """A new one. Returns at once; the process may begin later.

        Raises:
            ServingError: none can be had.
        """


@final
class Nursery:
    """Hosts of one tokenizer's grammars, forked from a process that has read the vocabulary once.

    It starts with the first host and ends with this object, or this process.

    Args:
        num_logits: of the model.

    Raises:
        ConfigError: no eos, or fewer logits than tokens.
        MissingExtraError: `llguidance` is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, num_logits: int, limits: Limits) -> None:
        require("llguidance", extra="grammar")
        ending_ids(tokenizer, num_logits)
        self._described = tokenizer, num_logits, limits
        self._control: Connection | None = None
        self._numbers = itertools.count()

    def open(self) -> Host:
        """See `Hosts`."""
        try:
            control = self._control if self._control is not None else self._start()
            ours, theirs = Pipe()
            number = next(self._numbers)
            with theirs:
                control.send((OPEN, number))
                send_handle(control, theirs.fileno(), None)
        except OSError as error:
            self._control = None  # the next one starts another
            raise ServingError(f"the process that runs grammars is gone ({error}); try again") from error
        return _Process(ours, control, number)

    def _start(self) -> Connection:
        control, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "lockstep.tokenize.grammar_host", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=child_environment(PYTHONPATH=os.pathsep.join(path or "." for path in sys.path)),
            )
        self._control = control
        weakref.finalize(self, _end, process, control)
        control.send(self._described)
        return control


@final
class _Process:
    def __init__(self, pipe: Connection, control: Connection, number: int) -> None:
        self.pipe = pipe
        self._control = control
        self._number = number

    def close(self) -> None:
        self.pipe.close()
        with contextlib.suppress(OSError):  # gone with all its hosts
            self._control.send((KILL, self._number))


def _end(process: subprocess.Popen[bytes], control: Connection) -> None:
    control.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(END_S)
