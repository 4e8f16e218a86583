"""A reply to a request that generates: whole or as server-sent events, and never for a client that has left.

    body --parse--> Exchange(job) --run--> pieces --translate--> frames --> client
    client leaves (http.disconnect) --> cancels the above --> the job is aborted

A stream's headers go out with its first piece, so that what the engine refuses is an HTTP status.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.responses import Response

from lockstep.core.errors import DeadlineError, InputError
from lockstep.server.generation import Choice, Job, Piece, collect, run
from lockstep.server.limits import Disconnected, decoded, parse_json
from lockstep.server.replies import Refusal, Reply, json_reply
from lockstep.server.service import LanguageService

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
LARGE_BODY = 16_000
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
log = logging.getLogger("lockstep.server")


class Exchange(ABC):
    """One request in one dialect: the job it stands for, and the job's pieces in the dialect's words."""

    job: Job
    is_stream: bool
    names: Mapping[str, str] = MappingProxyType({})
    """What the engine calls a part of the request -> what this dialect calls it, where they differ."""

    @abstractmethod
    def whole(self, choices: list[Choice]) -> Any:
        """The reply's document."""

    @abstractmethod
    def piece(self, piece: Piece) -> Iterable[bytes]:
        """Frames of a piece; none when it says nothing to the client."""

    @abstractmethod
    def end(self) -> Iterable[bytes]:
        """Frames after the last piece."""


ErrorReply = Callable[[Refusal | InputError], Reply]
ErrorFrame = Callable[[Reply], bytes]
Make = Callable[[LanguageService, dict[str, Any]], Exchange]


class Answer(Response):
    """The reply to a generating request, made while it is sent.

    Args:
        make: the dialect's reading of a body.
        envelope: a refusal in the dialect's words.
        frame: the same within a stream.
    """

    def __init__(
        self,
        service: LanguageService,
        body: bytes,
        headers: dict[bytes, bytes],
        make: Make,
        envelope: ErrorReply,
        frame: ErrorFrame,
    ) -> None:
        super().__init__()
        self._service = service
        self._bytes = body
        self._request_headers = headers
        self._make = make
        self._envelope = envelope
        self._frame = frame
        self._started = False
        self._names: Mapping[str, str] = {}

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._answer(send))
        except Disconnected:
            self._service.metrics.num_disconnected += 1
        except Exception as error:
            refusal = as_refusal(error)
            if isinstance(refusal, InputError) and refusal.field in self._names:
                refusal = InputError(str(refusal), field=self._names[refusal.field])
            reply = self._envelope(refusal)
            if not self._started:
                await send_reply(send, reply)
                return
            # The status is out: the dialect's error frame is all that can still be said.
            await send({"type": "http.response.body", "body": self._frame(reply), "more_body": False})

    async def _answer(self, send: Send) -> None:
        service = self._service
        service.check_open()
        limit = service.config.max_body_bytes

        def read() -> Exchange:
            return self._make(service, parse_json(decoded(self._bytes, self._request_headers, limit)))

        # Tokenising a long text takes longer than other clients' streams should stand still.
        exchange = await asyncio.to_thread(read) if len(self._bytes) > LARGE_BODY else read()
        self._names = exchange.names
        if not exchange.is_stream:
            await send_reply(send, json_reply(exchange.whole(await collect(service, exchange.job))))
            return
        async with aclosing(run(service, exchange.job)) as pieces:
            await self._stream(exchange, pieces, send)

    async def _stream(self, exchange: Exchange, pieces: AsyncIterator[Piece], send: Send) -> None:
        async for piece in pieces:
            frames = b"".join(exchange.piece(piece))
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            if frames:
                await send({"type": "http.response.body", "body": frames, "more_body": True})
        await send({"type": "http.response.body", "body": b"".join(exchange.end()), "more_body": False})


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        Disconnected: the client left first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        for other in (task, watch):
            other.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def as_refusal(error: Exception) -> Refusal | InputError:
    """An error that a reply can tell."""
    if isinstance(error, Refusal | InputError):
        return error
    if isinstance(error, DeadlineError):
        return Refusal(503, str(error), retry_after_s=5)
    log.error("a request failed", exc_info=error)
    return Refusal(500, "internal error; the server's log has it")


async def send_reply(send: Send, reply: Reply) -> None:
    """A complete reply."""
    headers = [*reply.headers, (b"content-length", str(len(reply.body)).encode())]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


def data_frame(document: Any, event: str = "") -> bytes:
    """A server-sent event.

    >>> data_frame({"a": 1}, "x")
    b'event: x\\ndata: {"a":1}\\n\\n'
    """
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + to_json(document) + b"\n\n"
