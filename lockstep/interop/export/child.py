"""A runtime in a process of its own: it answers on a socket, within a deadline, and ends with us.

The child gets its end of the socket as a file descriptor, whose number is its last argument. What it prints goes to a log,
where an error looks for the reason.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

from lockstep.core.errors import DeadlineError


class Child:
    """Starts `command`.

    Args:
        command: program and arguments, without the descriptor.
        name: of the runtime, for errors.
        environment: of the process.
        deadline_s: that each answer has.
    """

    def __init__(self, command: Sequence[object], name: str, environment: dict[str, str], deadline_s: float) -> None:
        self.name, self.deadline_s = name, deadline_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*(str(part) for part in command), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
            )
        ours.settimeout(deadline_s)
        self._stream = ours.makefile("rwb")
        self.close = weakref.finalize(self, _end, self._process, self._stream, ours, self._log)

    def send(self, data: bytes) -> None:
        """Write; a child that is gone shows in the answer that does not come."""
        with contextlib.suppress(BrokenPipeError):
            self._stream.write(data)
            self._stream.flush()

    def read(self, num_bytes: int) -> bytes:
        """So many bytes, fewer if the child ended.

        Raises:
            DeadlineError: they did not come in time.
        """
        with self._in_time():
            return self._stream.read(num_bytes)

    def line(self) -> bytes:
        """The next line, empty if the child ended.

        Raises:
            DeadlineError: it did not come in time.
        """
        with self._in_time():
            return self._stream.readline()

    def reason(self) -> str:
        """Why it ended, by its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # its last words come with its end
            self._process.wait(timeout=10)
        self._log.seek(0)
        return reason_of(self._log.read().decode(errors="replace"))

    @contextlib.contextmanager
    def _in_time(self) -> Any:
        try:
            yield
        except ConnectionError:
            return
        except TimeoutError as error:
            raise DeadlineError(f"{self.name} did not answer within {self.deadline_s:.0f} s") from error


def reason_of(text: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] and not line.startswith(" ")]
    return (errors or lines or ["it ended without a word"])[-1][:400]


def _end(process: subprocess.Popen[bytes], *files: Any) -> None:
    process.kill()
    process.wait(timeout=30)
    for file in files:
        with contextlib.suppress(OSError):
            file.close()
