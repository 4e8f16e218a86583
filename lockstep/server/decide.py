"""From a checked observation to a decision: session, randomness, queue. Both protocols end here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.core.errors import InputError
from lockstep.server.replies import Refusal, shown
from lockstep.server.repository import Loaded, Repository, Served
from lockstep.server.runner import Ask, Decision

MAX_SESSION_ID = 256


@dataclass(slots=True)
class Wish:
    """How a request wants its decision made.

    >>> Wish().deterministic
    True
    """

    deterministic: bool = True
    seed: int | None = None
    session_id: str | None = None
    reset: np.ndarray | None = None
    end_session: bool = False
    timeout_s: float | None = None


def ready_policy(repository: Repository, name: str) -> Served:
    """The policy of that name.

    Raises:
        Refusal: 404 unknown, 503 unloaded.
    """
    served = repository[name]
    if not served.ready:
        raise Refusal(503, f"policy {name!r} is unloaded; load it first", field="name", retry_after_s=1)
    return served


async def decide(
    repository: Repository, served: Served, loaded: Loaded, obs: Any, num_rows: int, wish: Wish
) -> Decision:
    """Queue the rows and wait for their decision; the wait ends by the request's deadline at the latest.

    Raises:
        InputError: the session or the values do not fit.
        Refusal: overload, deadline.
    """
    timeout_s = served.config.request_timeout_s
    if wish.timeout_s is not None:
        timeout_s = min(timeout_s, wish.timeout_s)
    batcher = served.batcher
    if wish.session_id is None:
        seed, stream = (repository.seed, repository.new_streams(num_rows)) if wish.seed is None else (wish.seed, 0)
        ask = Ask(obs, num_rows, wish.deterministic, seed, stream)
        return await batcher.submit(ask, loaded.runner, inline=loaded.inline, timeout_s=timeout_s)
    batcher.check_room()
    session = served.sessions.take(wish.session_id, num_rows, wish.seed, repository.seed, repository.new_streams)
    try:
        ask = Ask(obs, num_rows, wish.deterministic, session.seed, session.first_stream, session, wish.reset)
        return await batcher.submit(ask, loaded.runner, inline=loaded.inline, timeout_s=timeout_s)
    finally:
        served.sessions.give_back(session)
        if wish.end_session:
            served.sessions.remove(session.name)


def read_flag(document: dict[str, Any], name: str, default: bool) -> bool:
    """A boolean field.

    Raises:
        InputError: another type.
    """
    value = document.get(name, default)
    if value is True or value is False:
        return value
    raise InputError(f"{name}: expected true or false; got {shown(value)}", field=name)


def read_seed(document: dict[str, Any]) -> int | None:
    """The `seed` field, 0..2**63-1, or None.

    Raises:
        InputError: anything else.
    """
    value = document.get("seed")
    if value is None or (type(value) is int and 0 <= value < 2**63):
        return value
    raise InputError(f"seed: expected an integer in 0..2**63-1; got {shown(value)}", field="seed")


def read_session_id(document: dict[str, Any], name: str = "session_id") -> str | None:
    """A session's id, a text of 1 to 256 characters, or None.

    Raises:
        InputError: anything else.
    """
    value = document.get(name)
    if value is None or (isinstance(value, str) and 0 < len(value) <= MAX_SESSION_ID):
        return value
    raise InputError(f"{name}: expected text of 1 to {MAX_SESSION_ID} characters; got {shown(value)}", field=name)
