"""Episodes in progress: what a recurrent or frame-stacking policy remembers of each client, and how far its random
stream has gone.

A session's state is read when a batch is formed and written when it is done; the batcher never has two requests of one
session in flight, so no lock is needed. The store is touched by the event loop only.

Legend: N rows of a session (one, or those of a vector environment).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.models.control.policy import Policy
from lockstep.server.replies import Refusal, shown


class Session:
    """State of one client's N rows. `position` counts decisions; noise is keyed by (seed, stream, position)."""

    def __init__(self, name: str, num_rows: int, seed: int, first_stream: int) -> None:
        self.name = name
        self.num_rows = num_rows
        self.seed = seed
        self.first_stream = first_stream
        self.position = 0
        self.state: dict[str, Tensor] = {}
        self.starts = np.ones(num_rows, np.bool_)
        self.num_pending = 0
        self.last_used = 0.0
        self._policy: Policy | None = None

    def fit(self, policy: Policy) -> None:
        """Keep the state if `policy` can go on with it; else its next decision begins an episode."""
        if policy is self._policy:
            return
        fresh = policy.initial_state(self.num_rows)
        same = set(fresh) == set(self.state) and all(
            fresh[name].shape == x.shape and fresh[name].dtype == x.dtype for name, x in self.state.items()
        )
        if not same:
            self.state = fresh
            self.starts = np.ones(self.num_rows, np.bool_)
        self._policy = policy

    def advance(self, state: dict[str, Tensor]) -> None:
        """After a decision."""
        self.state = state
        self.position += 1
        self.starts = np.zeros(self.num_rows, np.bool_)


class Sessions:
    """Sessions of one policy by id, bounded in number and age.

    Args:
        limit: most sessions; the one longest unused makes room.
        ttl_s: seconds after its last use at which a session is forgotten.
        clock: seconds, monotonic.
    """

    def __init__(self, limit: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.ttl_s = ttl_s
        self.clock = clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def take(
        self, name: str, num_rows: int, seed: int | None, default_seed: int, new_streams: Callable[[int], int]
    ) -> Session:
        """The session of that id, made if unknown, with its use counted until `give_back`.

        Args:
            seed: of its noise, or None for whatever it has (`default_seed` and a fresh stream if it is new).

        Raises:
            InputError: the session has another number of rows or another seed.
            Refusal: no room, all sessions have requests in flight.
        """
        self.expire()
        session = self._sessions.get(name)
        if session is None:
            self._make_room()
            if seed is None:
                session = Session(name, num_rows, default_seed, new_streams(num_rows))
            else:
                session = Session(name, num_rows, seed, 0)
            self._sessions[name] = session
        elif session.num_rows != num_rows:
            raise InputError(
                f"session_id: session {shown(name)} has {session.num_rows} rows, this request {num_rows}; "
                "delete it first or use another id",
                field="session_id",
            )
        elif seed is not None and seed != session.seed:
            raise InputError(
                f"seed: session {shown(name)} began with another seed; delete it first or leave seed out", field="seed"
            )
        session.num_pending += 1
        session.last_used = self.clock()
        self._sessions.move_to_end(name)
        return session

    def give_back(self, session: Session) -> None:
        """A request of the session is answered."""
        session.num_pending -= 1

    def remove(self, name: str) -> bool:
        """Forget a session; requests in flight still finish. False if there is none."""
        return self._sessions.pop(name, None) is not None

    def expire(self) -> None:
        """Forget sessions that were not used for `ttl_s`."""
        oldest = self.clock() - self.ttl_s
        while self._sessions:
            session = next(iter(self._sessions.values()))
            if session.last_used >= oldest or session.num_pending:
                return
            del self._sessions[session.name]

    def _make_room(self) -> None:
        if len(self._sessions) < self.limit:
            return
        for name, session in self._sessions.items():
            if not session.num_pending:
                del self._sessions[name]
                return
        raise Refusal(429, f"all {self.limit} sessions have requests in flight", field="session_id", retry_after_s=1)
