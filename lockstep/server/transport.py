"""One packet per reply. uvicorn writes a reply's head and its body one after the other, which costs two system calls and
wakes the client twice; this joins what a connection writes within one turn of the event loop.

    uvicorn's protocol --write--> JoinedTransport: list --(end of this turn)--> the real transport --> socket

A wrapper, not a subclass: the protocol is uvicorn's own and does not know. Back pressure stays with the real transport,
which calls the protocol's pause_writing and resume_writing itself.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class JoinedTransport:
    """The part of a transport that uvicorn's protocol uses."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send at the end of this turn."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)

    def flush(self) -> None:
        """Send now."""
        if self._parts:
            parts, self._parts = self._parts, []
            self._transport.write(b"".join(parts))

    def close(self) -> None:
        """Send what is left, then close."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """As the real transport says."""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As the real transport says."""
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """Stop the client."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Let the client go on."""
        self._transport.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection over."""
        self.flush()
        self._transport.set_protocol(protocol)


class JoinedProtocol(asyncio.Protocol):
    """uvicorn's protocol for one connection, behind a `JoinedTransport`. Takes the arguments that uvicorn gives."""

    def __init__(self, **wiring: Any) -> None:
        self._inner = HttpToolsProtocol(**wiring)
        self._loop = asyncio.get_running_loop()
        self.data_received = self._inner.data_received  # type: ignore[method-assign]  # no call between: the hot path
        self.eof_received = self._inner.eof_received  # type: ignore[method-assign]
        self.connection_lost = self._inner.connection_lost  # type: ignore[method-assign]
        self.pause_writing = self._inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = self._inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inner.connection_made(JoinedTransport(transport, self._loop))  # type: ignore[arg-type]
