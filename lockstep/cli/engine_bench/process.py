"""One library in a process of its own, asked by lines of JSON.

    caller: writes a line, waits for the answer until a deadline -> kills the process when it passes
    worker: reads a line, works, writes a line; blocks on its input between two, so that it costs nothing while the other
            library is measured; ends when its input ends

Loaded once, measured in turn with its peer: that is what makes medians of noisy machines comparable.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import tempfile
import time
from types import TracebackType
from typing import Any

from lockstep.core.env import child_environment
from lockstep.core.errors import ConfigError, DeadlineError


class Worker:
    """A running worker.

    Args:
        command: prints one line of JSON for each that it reads; what it writes to stderr is shown when it fails.
        deadline_s: for each answer.
        environment: added to the child's.
    """

    def __init__(self, name: str, command: list[str], deadline_s: float, environment: dict[str, str]) -> None:
        self.name = name
        self.deadline_s = deadline_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=child_environment(**environment),
        )
        self._rest = b""

    def tell(self, message: dict[str, Any]) -> None:
        """A line that is not answered.

        Raises:
            ConfigError: the worker has ended; the message ends with its last lines.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("plan") from None

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """What the worker answers.

        Raises:
            ConfigError: it failed; the message ends with its last lines.
            DeadlineError: it did not answer in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed(op) from None
        answer: dict[str, Any] = json.loads(self._line(op))
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20 if error is None else 0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _line(self, op: str) -> bytes:
        stream = self._process.stdout
        assert stream is not None
        end = time.monotonic() + self.deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(end - time.monotonic(), 0.0)):
                    self._process.kill()
                    raise DeadlineError(f"{self.name}: no answer to {op!r} within {self.deadline_s:.0f} s")
                piece = stream.read1(1 << 16)  # type: ignore[attr-defined]
                if not piece:
                    raise self._failed(op)
                self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _failed(self, op: str) -> ConfigError:
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip()
        return ConfigError(f"{self.name} failed at {op!r}:\n{said[-2500:]}")
