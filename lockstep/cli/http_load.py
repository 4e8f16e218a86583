"""A lean HTTP/1.1 client for measuring servers: many keep-alive connections in one process, each with one request out.

    connection: write request --> read reply, note its latency --> write the next, until the time is over

Run as a process of its own (`python -m lockstep.cli.http_load`), so that it does not share the server's interpreter: a
`LoadWish` as JSON on standard input, a `LoadResult` as JSON on standard output. Replies without `content-length`, and
connections that close, count as errors. The run ends `GRACE_S` after its time at the latest.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial

GRACE_S = 30.0


@dataclass(frozen=True)
class LoadWish:
    """What to send: one `request` (whole, as text) for each connection.

    >>> LoadWish("127.0.0.1", 8000, ["GET / HTTP/1.1\\r\\n\\r\\n"], 1.0).seconds
    1.0
    """

    host: str
    port: int
    requests: list[str]
    seconds: float


@dataclass(frozen=True)
class LoadResult:
    """Counts over `seconds`, and latencies in milliseconds. `error` is the first one met."""

    num_requests: int
    num_errors: int
    seconds: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    error: str = ""

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.num_requests / self.seconds


class _Tally:
    def __init__(self, until: float) -> None:
        self.until = until
        self.latencies: list[float] = []
        self.num_errors = 0
        self.error = ""

    def fail(self, text: str) -> None:
        self.num_errors += 1
        self.error = self.error or text


class _Connection(asyncio.Protocol):
    """One client; `done` is set when its time is over or its connection ends."""

    def __init__(self, request: bytes, tally: _Tally) -> None:
        self.request = request
        self.tally = tally
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.buffer = b""
        self.sent = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's transports do not derive from asyncio's
        self._send()

    def _send(self) -> None:
        assert self.transport is not None
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer + data if self.buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0 or not _is_whole(buffer, end):
            self.buffer = buffer
            return
        self.buffer = b""
        now = time.perf_counter()
        self.tally.latencies.append(now - self.sent)
        if buffer[9:12] != b"200":
            self.tally.fail(buffer[:300].decode("latin-1"))
        if now < self.tally.until:
            self._send()
        else:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.tally.fail(f"connection lost: {exc}")
            self.done.set_result(None)

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        assert self.transport is not None
        self.transport.close()


def _is_whole(buffer: bytes, end: int) -> bool:
    start = buffer.find(b"content-length: ", 0, end)
    if start < 0:
        start = buffer.lower().find(b"content-length: ", 0, end)
    stop = buffer.find(b"\r\n", start)
    return start >= 0 and len(buffer) >= end + 4 + int(buffer[start + 16 : stop])


async def _load(wish: LoadWish) -> LoadResult:
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    tally = _Tally(start + wish.seconds)
    pairs = await asyncio.gather(
        *(
            loop.create_connection(partial(_Connection, text.encode(), tally), wish.host, wish.port)
            for text in wish.requests
        )
    )
    done = [connection.done for _, connection in pairs]
    _, pending = await asyncio.wait(done, timeout=wish.seconds + GRACE_S)
    for _ in pending:
        tally.fail(f"no reply within {GRACE_S:.0f} s")
    seconds = time.perf_counter() - start
    ordered = sorted(tally.latencies) or [float("nan")]
    p50, p90, p99, top = (1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.9, 0.99, 1.0))
    return LoadResult(len(tally.latencies), tally.num_errors, seconds, p50, p90, p99, top, tally.error)


def run_load(wish: LoadWish) -> LoadResult:
    """Send for `wish.seconds` and count."""
    try:
        import uvloop

        return uvloop.run(_load(wish))
    except ImportError:
        return asyncio.run(_load(wish))


if __name__ == "__main__":
    print(json.dumps(asdict(run_load(LoadWish(**json.load(sys.stdin))))))
