"""Problems of generators that walk through Python sets: drawn in a process whose string hashes are fixed.

Sets of strings have another order in every process (PYTHONHASHSEED), and a generator that chooses from one poses another
problem. A process cannot fix its own hashes, so a child started with PYTHONHASHSEED=0 draws for it.

    caller (any thread, one at a time) -- (config, index) --> child: ReasoningGymTask(config).problem(index)
                                       <-- problem or error --      ends when the pipe closes
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, final

from lockstep.core.env import child_environment
from lockstep.core.errors import DeadlineError, EnvError
from lockstep.core.trajectory import Problem

DRAW_S = 300.0


def has_steady_hashes() -> bool:
    """Whether this process was started with PYTHONHASHSEED=0."""
    return not sys.flags.hash_randomization


@functools.cache
def steady_drawer() -> SteadyDrawer:
    """This process's child; started when first asked for."""
    return SteadyDrawer()


@final
class SteadyDrawer:
    """Draws problems in a child process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipe, theirs = Pipe()
        handle = theirs.fileno()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "lockstep.envs.lm.steady", str(handle)],
            pass_fds=(handle,),
            stdin=subprocess.DEVNULL,
            env=child_environment(PYTHONHASHSEED="0", PYTHONPATH=os.pathsep.join(path or "." for path in sys.path)),
        )
        theirs.close()

    def draw(self, config: Any, index: int) -> Problem:
        """`ReasoningGymTask(config).problem(index)`, drawn in the child.

        Raises:
            DeadlineError, EnvError: the child hangs or is gone.
        """
        with self._lock:
            try:
                self._pipe.send((config, index))
                if not self._pipe.poll(DRAW_S):
                    self.close()
                    raise DeadlineError(f"{config.generator}: no problem {index} within {DRAW_S:g} s; make it easier")
                answer = self._pipe.recv()
            except (OSError, EOFError) as error:
                self.close()
                raise EnvError(f"the process that draws {config.generator}'s problems is gone: {error}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the child; the next `steady_drawer()` starts another."""
        self._child.kill()
        self._child.wait(5.0)
        self._pipe.close()
        steady_drawer.cache_clear()


def serve(handle: int) -> None:
    """The child's life."""
    from lockstep.envs.lm.reasoning_gym import ReasoningGymTask

    pipe = Connection(handle)
    make = functools.lru_cache(maxsize=8)(lambda key: ReasoningGymTask(key.config))
    while True:
        try:
            config, index = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            pipe.send(make(_Key(config)).problem(index))
        except Exception as error:
            pipe.send(error)


class _Key:
    """A config as a key: it holds a mapping, which has no hash, but a text that says all."""

    def __init__(self, config: Any) -> None:
        self.config, self._text = config, repr(config)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text


if __name__ == "__main__":
    serve(int(sys.argv[1]))
