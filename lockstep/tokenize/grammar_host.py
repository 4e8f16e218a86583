"""The process in which a grammar lives: it compiles it, then says what may come next in the texts of one request.

    owner                              nursery (once)                     host (one a grammar)
    -----                              --------------                     --------------------
    tokenizer, number of logits  -->   builds what hosts share
    OPEN number, spec, a pipe    -->   forks  ------------------------->  limits itself: BEGUN
                                                                          compiles: READY, or the error
    list of commands  ------------------------------------------------>   (answers, whether more follow)
    KILL number                  -->   kills it
    closes the control pipe      -->   ends, and all hosts with it

The nursery has one thread, holds no lock and never touches a grammar, so that a fork of it is a clean process. A host that
takes more memory than it may, more processor time for one message, or more stack, is ended by the system, and its owner
reads the end of the pipe.

Texts go by numbers. Commands: (START, text), (COPY, text, other), (END, text), (TAKE, text, ids) and (MASKS, text, ids).
TAKE is answered by (TAKE, text, what is forced next, whether only the end can follow); MASKS, which asks what may follow the
text and each beginning of `ids`, by (MASKS, text, ids, [(mask, whether only the end can follow), ...]), which is shorter
where the grammar forbids one of them. In place of either stands (ERROR, text, message) once a text cannot go on. After the
answers to TAKE the masks that will be asked for next, of what is forced, follow unasked: the owner's model computes meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

from lockstep.core.child_process import settle
from lockstep.core.errors import InputError, LockstepError
from lockstep.tokenize.grammar import GrammarCompiler, GrammarMatcher, GrammarSpec

START, COPY, END, TAKE, MASKS, ERROR = "start", "copy", "end", "take", "masks", "error"
OPEN, KILL = "open", "kill"
BEGUN, READY, GONE = "begun", "ready", "gone"
"""GONE stands for a host that cannot be had."""
MOST_FORCED = 16
"""Tokens that a grammar leaves no choice about and that are told at a time."""
REAP_S = 1.0
Commands = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Limits:
    """Of one host."""

    memory_bytes: int = 1 << 30
    """Address space beyond what it begins with."""
    cpu_s: float = 10.0
    """Processor time for a message."""


def serve(
    pipe: Connection,
    spec: GrammarSpec,
    compile_spec: Callable[[GrammarSpec], GrammarMatcher],
    ration: Callable[[], None],
) -> None:
    """A host's life, until its owner closes the pipe.

    Args:
        ration: called before each message is worked on.
    """
    with contextlib.suppress(EOFError, OSError):
        ration()
        pipe.send(BEGUN)
        try:
            first = compile_spec(spec)
            first.copy().mask()  # what every text would wait for at its first token
        except LockstepError as error:
            pipe.send(str(error))
            return
        pipe.send(READY)
        texts: dict[int, GrammarMatcher] = {}
        while True:
            commands: Commands = pipe.recv()
            ration()
            answers = [answer for command in commands if (answer := _run(command, first, texts)) is not None]
            taken = [answer for answer in answers if answer[0] == TAKE and answer[1] in texts]
            next_masks = [(MASKS, text, tuple(forced)) for _, text, forced, is_finished in taken if not is_finished]
            pipe.send((answers, bool(next_masks)))
            if next_masks:
                pipe.send(([_run(command, first, texts) for command in next_masks], False))


def _run(command: tuple[Any, ...], first: GrammarMatcher, texts: dict[int, GrammarMatcher]) -> tuple[Any, ...] | None:
    word, text = command[0], command[1]
    try:
        if word == START:
            texts[text] = first.copy()
        elif word == COPY:
            texts[text] = texts[command[2]].copy()
        elif word == END:
            texts.pop(text, None)
        elif word == TAKE:
            return _take(texts[text], text, command[2])
        else:
            return MASKS, text, command[2], _masks(texts[text], command[2])
    except InputError as error:
        return ERROR, text, str(error)
    return None


def _take(matcher: GrammarMatcher, text: int, ids: list[int]) -> tuple[Any, ...]:
    for index in ids:
        if not matcher.advance(index):
            matcher.check()
            raise InputError(f"the text has left its grammar with token {index}")
    finished = matcher.is_finished
    forced = [] if finished else matcher.forced_tokens()[:MOST_FORCED]
    matcher.check()
    return TAKE, text, forced, finished


def _masks(matcher: GrammarMatcher, ids: tuple[int, ...]) -> list[tuple[bytes, bool]]:
    found, taken = [], 0
    try:
        for index in (*ids, None):
            found.append((matcher.mask().tobytes(), matcher.is_finished))
            if index is None or not matcher.advance(index):
                break
            taken += 1
    finally:
        if taken:
            matcher.rollback(taken)
    return found


def nurse(control: Connection) -> None:
    """The nursery's life, until its owner closes the pipe or dies."""
    # Who stops the server by signals to all of its processes lets it drain first; the end of the pipe says when it is over.
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)
    children: dict[int, int] = {}
    try:
        tokenizer, num_logits, limits = control.recv()
        compiler = GrammarCompiler(tokenizer, num_logits=num_logits)
        gc.freeze()
        while True:
            if control.poll(REAP_S):
                word, number, *spec = control.recv()
                if word == OPEN:
                    pid = _fork(control, recv_handle(control), spec[0], compiler, limits)
                    if pid is not None:
                        children[number] = pid
                elif number in children:  # not reaped, so that its process id is nobody else's
                    os.kill(children[number], signal.SIGKILL)
            for number, pid in list(children.items()):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del children[number]
    except EOFError:
        pass
    finally:
        for pid in children.values():
            os.kill(pid, signal.SIGKILL)


def _fork(control: Connection, handle: int, spec: GrammarSpec, compiler: GrammarCompiler, limits: Limits) -> int | None:
    try:
        pid = os.fork()
    except OSError:  # no more processes, or no memory, for now
        with Connection(handle) as pipe:
            pipe.send(GONE)
        return None
    if pid:
        os.close(handle)
        return pid
    try:
        control.close()
        settle(limits.memory_bytes)
        with contextlib.suppress(OSError):  # where memory runs out, this process goes first
            Path("/proc/self/oom_score_adj").write_text("1000")
        os.dup2(1, 2)  # what the library prints before it gives up is no news: the owner reads the end of the pipe
        serve(Connection(handle), spec, compiler.compile, lambda: _limit_cpu(limits.cpu_s))
    finally:
        os._exit(0)


def _limit_cpu(seconds: float) -> None:
    """From now on."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    wish = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (wish if hard == resource.RLIM_INFINITY else min(wish, hard), hard))


if __name__ == "__main__":
    nurse(Connection(int(sys.argv[1])))
