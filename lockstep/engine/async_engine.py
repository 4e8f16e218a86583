"""An engine for many asynchronous clients.

    client --_post--> inbox --worker thread: commands, then one step--> loop.call_soon_threadsafe --> stream --> client
                        ^                                                                               |
                        '---- abort, when a client leaves before the end ------------------------------'

- The worker owns the engine: nothing else calls it. It takes all commands from the inbox, runs one step, hands the
  outputs over. Without work it waits for a command, for at most IDLE_S at a time. It ends with `close`.
- A client waits for its command's future (at most `call_timeout_s`) and for its stream (at most `stall_timeout_s`
  between two outputs); both raise DeadlineError.
- A client that leaves, by cancellation or by closing the generator, posts an abort; the worker runs it before the next
  step, so its pages are free within one step.
- Idle for IDLE_S after some steps, it audits pages and references once; what does not add up is logged and kept in `faults`.
- A step that raises ends the requests it served with that error. The engine goes on with what comes next.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lockstep.core.collector import collector_spared
from lockstep.core.errors import DeadlineError, ServingError
from lockstep.core.request import Request, Sample
from lockstep.engine.emission import Output
from lockstep.engine.engine import Engine

IDLE_S = 1.0
T = TypeVar("T")
log = logging.getLogger("lockstep.engine")


@dataclass
class _Command:
    run: Callable[[Engine], Any]
    future: Future[Any] = field(default_factory=Future)


@dataclass
class _Stream:
    """Where the outputs of a request go."""

    loop: asyncio.AbstractEventLoop
    num_left: int
    """Samples whose end the client has not read."""
    num_open: int
    """Samples whose end the worker has not sent."""
    samples: list[Sample] = field(default_factory=list)
    outputs: asyncio.Queue[Output | Exception] = field(default_factory=asyncio.Queue)


class AsyncEngine:
    """Use as an async context manager, or call `start` and `close`.

    Args:
        engine: from now on used by this object's worker only.
        call_timeout_s: how long a command may wait, a step included.
        stall_timeout_s: how long a stream may wait for its next output, time in the queue included.
    """

    def __init__(self, engine: Engine, *, call_timeout_s: float = 60.0, stall_timeout_s: float = 600.0) -> None:
        self.plan = engine.plan
        self.tokenizer = engine.tokenizer
        self._engine = engine
        self._call_timeout_s = call_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._closing = False
        self.faults: tuple[str, ...] = ()
        """What the last idle check found; empty when all is well."""
        self._num_checked_steps = 0
        self._worker = threading.Thread(target=self._work, name="lockstep-engine", daemon=True)

    async def __aenter__(self) -> AsyncEngine:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self) -> None:
        """Starts the worker."""
        self._worker.start()

    async def close(self) -> None:
        """Aborts what runs, whose clients read so, and ends the worker.

        Raises:
            DeadlineError: a step does not end.
        """
        if not self._worker.is_alive():
            return

        def stop(engine: Engine) -> None:
            self._closing = True
            for request_id in list(self._streams):
                engine.abort(request_id)

        await self.call(stop)
        await asyncio.to_thread(self._worker.join, self._call_timeout_s)
        if self._worker.is_alive():
            raise DeadlineError(f"the engine's worker did not end within {self._call_timeout_s} s; a step hangs")

    async def call(self, function: Callable[[Engine], T]) -> T:
        """`function(engine)`, run by the worker between two steps: publications, pauses, audits.

        Raises:
            DeadlineError: the worker was busy for `call_timeout_s`; the function may still run later.
            ServingError: the engine is closed.
        """
        return await self._answer(self._post(function))

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Outputs of all samples of a request as they come. Leaving early aborts it.

        Raises:
            InputError, ServingError: as `Engine.add`.
            DeadlineError: nothing came for `stall_timeout_s`.
        """
        stream = _Stream(asyncio.get_running_loop(), request.params.n, request.params.n)

        def add(engine: Engine) -> None:
            stream.samples = engine.add(request)
            self._streams[request.id] = stream

        added = self._post(add)
        try:
            await self._answer(added)
            while stream.num_left:
                yield await self._next(stream, request.id)
        finally:
            # The add may not have run yet, or may be refused: the worker takes the two commands in this order.
            if stream.num_left and not (added.done() and (added.cancelled() or added.exception() is not None)):
                self._inbox.put(_Command(lambda engine: self._leave(engine, request.id, stream)))

    async def _answer(self, future: Future[T]) -> T:
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that meets the result.
            async with asyncio.timeout(self._call_timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            if future.done() and not future.cancelled():
                raise  # the function's own
            raise DeadlineError(
                f"the engine's worker did not answer within {self._call_timeout_s} s; its step is too long or hangs: "
                "use a smaller max_step_tokens, or a longer call_timeout_s"
            ) from error

    async def _next(self, stream: _Stream, request_id: str) -> Output:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                output = await stream.outputs.get()
        except TimeoutError as error:
            raise DeadlineError(
                f"request {request_id!r} got nothing for {self._stall_timeout_s} s; the engine is overloaded or paused"
            ) from error
        if isinstance(output, Exception):
            stream.num_left = 0
            raise output
        stream.num_left -= output.is_finished
        return output

    def _post(self, function: Callable[[Engine], T]) -> Future[T]:
        if not self._worker.is_alive():
            raise ServingError("the engine is not running; start it first, or make a new one after close")
        command = _Command(function)
        self._inbox.put(command)
        return command.future

    def _leave(self, engine: Engine, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is stream:
            engine.abort(request_id)
            del self._streams[request_id]

    def _work(self) -> None:
        engine = self._engine
        with collector_spared():
            while not self._closing:
                self._take_commands()
                try:
                    outputs = engine.step()
                except Exception as error:
                    log.exception("a step failed; its requests end")
                    self._fail(error)
                    continue
                self._hand_over(outputs)
        self._fail(ServingError("the engine was closed"))
        while not self._inbox.empty():
            self._run(self._inbox.get())

    def _take_commands(self) -> None:
        if not self._engine.has_work:
            try:
                self._run(self._inbox.get(timeout=IDLE_S))
            except queue.Empty:
                self._check_idle()
                return
        while not self._inbox.empty():
            self._run(self._inbox.get())

    def _check_idle(self) -> None:
        """Once after each busy stretch."""
        num_steps = self._engine.counters.num_steps
        if num_steps == self._num_checked_steps:
            return
        self._num_checked_steps = num_steps
        self.faults = tuple(self._engine.audit())
        for fault in self.faults:
            log.error("the idle check of pages and references found: %s", fault)

    def _run(self, command: _Command) -> None:
        if not command.future.set_running_or_notify_cancel():
            return
        if self._closing:
            command.future.set_exception(ServingError("the engine was closed"))
            return
        try:
            command.future.set_result(command.run(self._engine))
        except Exception as error:
            command.future.set_exception(error)

    def _hand_over(self, outputs: list[Output]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Output | Exception]]] = {}
        for output in outputs:
            stream = self._streams.get(output.sample.request_id)
            # The id may have gone to another request since this one was aborted.
            if stream is not None and any(sample is output.sample for sample in stream.samples):
                by_loop.setdefault(stream.loop, []).append((stream, output))
                stream.num_open -= output.is_finished
                if not stream.num_open:
                    del self._streams[output.sample.request_id]
        for loop, items in by_loop.items():
            _deliver(loop, items)

    def _fail(self, error: Exception) -> None:
        for request_id, stream in list(self._streams.items()):
            self._engine.abort(request_id)
            _deliver(stream.loop, [(stream, error)])
        self._streams.clear()


def _deliver(loop: asyncio.AbstractEventLoop, items: list[tuple[_Stream, Output | Exception]]) -> None:
    """One wake-up of the loop for all that a step brought its clients."""

    def put() -> None:
        for stream, output in items:
            stream.outputs.put_nowait(output)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        # The clients' loop is closed: nobody is left to read.
        log.info("outputs of %d streams dropped: their event loop is closed", len(items))
