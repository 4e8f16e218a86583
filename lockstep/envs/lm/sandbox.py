"""Running a program that a model wrote: a fresh interpreter, locked in, with limits and a deadline, killed as a group.

What it is for: programs that hang, fill memory or disk, start processes, open sockets or delete files by mistake or in
the course of training. It is no defence against somebody who looks for holes in the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lockstep.core.errors import ConfigError, EnvError

CHILD = Path(__file__).with_name("confinement.py")
MAX_OUTPUT = 1 << 20
_NOT_CONFINED = 125


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """What a program may take."""

    timeout_s: float = 5.0
    """Wall time of one run (seconds). The verifier pool's deadline must allow all runs of a problem."""
    cpu_s: int = 5
    """Processor time (seconds)."""
    memory_mb: int = 512
    """Address space (MiB)."""
    file_mb: int = 16
    """Largest file it may write, its output included (MiB)."""
    must_confine: bool = True
    """Refuse to run where the kernel cannot take away files, network and processes (Linux 5.13 or later can)."""

    def __post_init__(self) -> None:
        if not (self.timeout_s > 0 and self.cpu_s > 0 and self.memory_mb >= 64 and self.file_mb > 0):
            raise ConfigError(f"{self}: timeout_s, cpu_s and file_mb must be above 0, memory_mb 64 or more")


@final
@dataclass(frozen=True, kw_only=True)
class ProgramRun:
    """What became of a program."""

    is_finished: bool
    """Program and tests ran to their end: no exception, no early exit, no limit passed."""
    output: str
    """Standard output, at most 1 MiB."""
    detail: str
    """Why it did not finish: the last line of its error, the signal or the deadline."""
    seconds: float


def run_program(program: str, config: SandboxConfig, *, stdin: str = "", tests: str = "") -> ProgramRun:
    """Run Python source in a sandbox.

    Args:
        program: the source.
        config: its limits.
        stdin: its standard input.
        tests: source run after it in the same names, such as assert statements.

    Raises:
        EnvError: the sandbox could not be set up; says nothing about the program.
    """
    token = secrets.token_hex(16)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lockstep-", ignore_cleanup_errors=True) as folder:
        home = Path(folder, "home")
        home.mkdir()
        Path(folder, "in").write_text(stdin, errors="surrogatepass")
        wish = {
            "program": program,
            "tests": tests,
            "token": token,
            "folder": str(home),
            "cpu_s": config.cpu_s,
            "memory_bytes": config.memory_mb << 20,
            "file_bytes": config.file_mb << 20,
            "must_confine": config.must_confine,
        }
        Path(folder, "wish").write_text(json.dumps(wish))
        code = _run(Path(folder), home, config.timeout_s)
        output = _head(Path(folder, "out"))
        error = _head(Path(folder, "err"))
        shutil.rmtree(home, ignore_errors=True)
    if code == _NOT_CONFINED and error == "no confinement\n":
        raise EnvError(
            "this kernel cannot confine a program (Landlock and seccomp of Linux 5.13 or later are needed); set "
            "must_confine=False to run programs with resource limits only"
        )
    is_finished = code == 0 and output.endswith(token)
    return ProgramRun(
        is_finished=is_finished,
        output=output.removesuffix(token),
        detail="" if is_finished else _reason(code, error, config),
        seconds=time.monotonic() - started,
    )


def _run(folder: Path, home: Path, timeout_s: float) -> int | None:
    """Exit status of the child, negative for a signal; None if it passed its deadline and was killed."""
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(CHILD)]
    with (
        open(folder / "in") as stdin,
        open(folder / "out", "wb") as stdout,
        open(folder / "err", "wb") as stderr,
        open(folder / "wish") as wish,
    ):
        try:
            child = subprocess.Popen(
                ["/bin/sh", "-c", 'exec "$@" 3<"$WISH"', "sh", *command],
                cwd=home,
                env={"WISH": wish.name, "HOME": str(home), "TMPDIR": str(home), "PATH": os.defpath},
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            raise EnvError(f"a sandbox cannot be started: {error}") from error
        try:
            return child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(5.0)


def _head(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(MAX_OUTPUT).decode("utf-8", errors="replace")


def _reason(code: int | None, error: str, config: SandboxConfig) -> str:
    if code is None:
        return f"took more than timeout_s={config.timeout_s:g}"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"killed after cpu_s={config.cpu_s} of processor time, or for want of memory"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    last = error.strip().splitlines()[-1:] or [""]
    return last[0][:500] or ("ended before its tests did" if code == 0 else f"exit status {code}")
