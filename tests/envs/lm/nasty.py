"""A task whose verifier does what the answer says."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from typing import Any

from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.task import Task


class _Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")


class NastyTask(Task):
    @property
    def name(self) -> str:
        return "nasty"

    @property
    def num_problems(self) -> int | None:
        return None

    def problem(self, index: int) -> Problem:
        return Problem(index=index, prompt="?", answer=str(index))

    def score(self, problem: Problem, text: str) -> Any:
        word, _, rest = text.partition(" ")
        return ACTIONS[word](rest) if word in ACTIONS else Score.of(float(text == problem.answer))


def _print(rest: str) -> Score:
    print("x" * 100_000)
    os.write(1, b"y" * 100_000)
    return Score.of(1.0)


def _raise(rest: str) -> Score:
    raise ValueError(rest)


def _child(rest: str) -> Score:
    """A child of its own that outlives the verifier's patience; its pid goes to a file."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(rest, "w") as file:
        file.write(str(child.pid))
    time.sleep(60)
    return Score.of(1.0)


def _busy(rest: str) -> Score:
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            continue


def _base(rest: str) -> Score:
    raise GeneratorExit


ACTIONS = {
    "sleep": lambda rest: time.sleep(float(rest)),
    "busy": _busy,
    "raise": _raise,
    "base": _base,
    "exit": lambda rest: os._exit(int(rest)),
    "sys.exit": lambda rest: sys.exit(int(rest)),
    "segfault": lambda rest: ctypes.string_at(0),
    "print": _print,
    "nan": lambda rest: Score(value=float("nan")),
    "float_nan": lambda rest: float("nan"),
    "float": float,
    "none": lambda rest: None,
    "text": lambda rest: "1.0",
    "lambda": lambda rest: lambda: 1,
    "memory": lambda rest: Score.of(float(len(bytearray(int(rest) << 20)))),
    "child": _child,
    "unprintable": lambda rest: (_ for _ in ()).throw(RuntimeError(_Broken())),
}


class Stuck:
    """A task that loads in no other process."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return (_unpickled, (self.kind,))


def _unpickled(kind: str) -> object:
    if kind == "raise":
        raise ValueError("no file")
    if kind == "exit":
        os._exit(4)
    return time.sleep(60)
