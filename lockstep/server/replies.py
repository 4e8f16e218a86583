"""What a handler hands back, and the refusals that become an error reply."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic_core import to_json

from lockstep.core.errors import InputError, ServingError

JSON_HEADER = (b"content-type", b"application/json")
MAX_MESSAGE = 500


class Reply(NamedTuple):
    """An HTTP reply, complete.

    >>> Reply(200, b"{}").status
    200
    """

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = (JSON_HEADER,)


class Refusal(ServingError):
    """A request that is not served, with its HTTP status; `field` names what the client can change.

    >>> Refusal(404, "unknown policy", field="name").status
    404
    """

    def __init__(self, status: int, message: str, *, field: str = "", retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.retry_after_s = retry_after_s


def json_reply(document: Any, status: int = 200) -> Reply:
    """A JSON reply; floats keep all their bits."""
    return Reply(status, to_json(document))


def error_reply(error: Refusal | InputError) -> Reply:
    """Triton's envelope `{"error": ...}`, with `field` where one is to blame."""
    status = error.status if isinstance(error, Refusal) else 400
    document = {"error": shortened(str(error), MAX_MESSAGE)}
    if error.field:
        document["field"] = shortened(error.field, 200)
    return Reply(status, to_json(document), error_headers(error))


def error_headers(error: Refusal | InputError) -> tuple[tuple[bytes, bytes], ...]:
    """The headers of an error's reply."""
    headers: tuple[tuple[bytes, bytes], ...] = (JSON_HEADER,)
    if isinstance(error, Refusal) and error.retry_after_s is not None:
        headers = (*headers, (b"retry-after", str(error.retry_after_s).encode()))
    if isinstance(error, Refusal) and error.status == 401:
        headers = (*headers, (b"www-authenticate", b"Bearer"))
    return headers


def shortened(text: str, limit: int = 80) -> str:
    """Text of a client for an error message.

    >>> shortened("abcdef", 4)
    'abc…'
    """
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shown(value: Any) -> str:
    """A client's value for an error message, at bounded length and cost."""
    if isinstance(value, str):
        return repr(shortened(value))
    if isinstance(value, list | dict):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a huge integer"
    return repr(value)
