"""What is asked of a request before its content counts: size, encoding, media type, key.

Every wait for a body's next part has a deadline.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pydantic_core import from_json

from lockstep.server.replies import Refusal, shortened, shown

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Headers = Mapping[bytes, bytes]
SWEEP_S = 0.1


class Disconnected(Exception):
    """The client left while its body was read."""


class BodyReader:
    """Reads bodies within a size and a time.

    The deadlines of all bodies being read share one timer: it looks at them every `SWEEP_S` while there are any, and
    cancels the await of those that are late. (A timer for each costs more than reading a small body.)
    """

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self._reading: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, receive: Receive, headers: Headers) -> bytes:
        """A request's whole body, as sent.

        Raises:
            Refusal: 413 too large, 408 too slow, 400 a content-length that is no number.
            Disconnected: the client left.
        """
        length = headers.get(b"content-length")
        if length is not None and int_header(length, "content-length") > self.max_bytes:
            raise _too_large(self.max_bytes)
        task = asyncio.current_task()
        assert task is not None
        self._reading[task] = time.monotonic() + self.timeout_s
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        try:
            return await self._parts(receive)
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            task.uncancel()
            raise Refusal(408, f"the body did not arrive within {self.timeout_s:g} s", field="body") from None
        finally:
            del self._reading[task]
            self._late.discard(task)

    async def _parts(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            body = message.get("body", b"")
            size += len(body)
            if size > self.max_bytes:
                raise _too_large(self.max_bytes)
            if not message.get("more_body", False):
                return b"".join([*parts, body]) if parts else body
            parts.append(body)

    def _sweep(self) -> None:
        self._timer = None
        now = time.monotonic()
        for task, deadline in self._reading.items():
            if deadline < now and task not in self._late:
                self._late.add(task)
                task.cancel()
        if self._reading:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)


def decoded(body: bytes, headers: Headers, max_bytes: int) -> bytes:
    """The body with gzip or deflate undone.

    Raises:
        Refusal: 415 another encoding, 400 damaged, 413 too large once unpacked.
    """
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding in (b"identity", b""):
        return body
    if encoding not in (b"gzip", b"deflate", b"x-gzip"):
        raise Refusal(
            415, f"content-encoding {_text(encoding)}; expected gzip, deflate or none", field="content-encoding"
        )
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16 if b"gzip" in encoding else zlib.MAX_WBITS)
    try:
        plain = unpacker.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise Refusal(400, f"the body is not {_text(encoding)}", field="content-encoding") from error
    if len(plain) > max_bytes:
        raise _too_large(max_bytes)
    if not unpacker.eof:
        raise Refusal(400, f"the body ends within its {_text(encoding)} data", field="content-encoding")
    return plain


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object. NaN and infinities are read, so that the check of the field they stand in can name it.

    Raises:
        Refusal: 400.
    """
    if not body:
        raise Refusal(400, "the body is empty; expected a JSON object", field="body")
    try:
        document = from_json(body, allow_inf_nan=True)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {shortened(str(error), 200)}", field="body") from error
    if not isinstance(document, dict):
        raise Refusal(400, f"the body must be a JSON object; got {shown(document)}", field="body")
    return document


def check_media(headers: Headers, allowed: tuple[bytes, ...]) -> None:
    """Raises Refusal 415 if a content type is given and is not one of `allowed`."""
    media = headers.get(b"content-type")
    if media is None or media in allowed:
        return
    if media.split(b";", 1)[0].strip().lower() not in allowed:
        names = " or ".join(_text(name) for name in allowed)
        raise Refusal(415, f"content-type {_text(media)}; expected {names}", field="content-type")


def check_key(headers: Headers, key: bytes) -> None:
    """Raises Refusal 401 unless `Authorization: Bearer KEY` or `X-API-Key: KEY` holds the key; constant time."""
    given = headers.get(b"x-api-key", b"")
    scheme, _, rest = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        given = rest.strip()
    if not hmac.compare_digest(given, key):
        raise Refusal(401, "an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY", field="authorization")


def int_header(value: bytes, name: str) -> int:
    """A non-negative decimal header.

    Raises:
        Refusal: 400.
    """
    if not value.isdigit() or len(value) > 18:
        raise Refusal(400, f"{name}: {_text(value)} is not a length in bytes", field=name)
    return int(value)


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(
        413, f"the body is larger than {max_bytes} bytes, the limit of this server (--max-body-bytes)", field="body"
    )


def _text(value: bytes) -> str:
    return repr(shortened(value.decode("latin-1")))
