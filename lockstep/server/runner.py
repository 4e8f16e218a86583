"""One policy at work on rows of many requests. Every number comes from `Actor`; rows do not see each other, so a row's
reply has the same bits alone and in any batch.

Legend: N rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy
from lockstep.server.sessions import Session
from lockstep.server.tensors import OBSERVATION, Interface

WARM_ROWS = 32


@dataclass(slots=True)
class Decision:
    """What a request gets: N rows of environment action, log-probability and, with a critic, value."""

    action: np.ndarray
    logprob: np.ndarray
    value: np.ndarray | None


@dataclass(slots=True)
class Ask:
    """What a request wants: N rows of observation, and whose randomness and state they use.

    Without a session the rows are each an episode's first decision, drawn by (`seed`, stream) at position 0.
    """

    obs: Any
    num_rows: int
    deterministic: bool
    seed: int
    first_stream: int
    session: Session | None = None
    reset: np.ndarray | None = None


class Runner:
    """Runs batches of a policy. Not thread-safe: one batch at a time.

    Args:
        policy: never written to.
        interface: of that policy.
        max_rows: batches of up to so many rows keep their actor for the next one.
    """

    def __init__(self, policy: Policy, interface: Interface, max_rows: int) -> None:
        self.policy = policy
        self.interface = interface
        self.max_rows = max_rows
        self.has_state = bool(policy.initial_state(1))
        self._actors: dict[int, Actor] = {}

    def warm(self) -> float:
        """Run the policy on zeros; returns the best seconds of a batch of 32 rows (or the largest allowed)."""
        seconds = []
        for num_rows in (1, *[min(WARM_ROWS, self.max_rows)] * 3):
            ask = Ask(self.interface.example(num_rows), num_rows, True, 0, 0)
            start = time.perf_counter()
            self.run([ask])
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    def run(self, asks: Sequence[Ask]) -> list[Decision | InputError]:
        """One decision for each request, in order; sessions' states advance where the decision is finite.

        A session may appear once.
        """
        first = asks[0]
        if all(ask.deterministic == first.deterministic for ask in asks) and (
            first.deterministic or all(ask.seed == first.seed for ask in asks)
        ):
            return self._run_alike(asks)
        groups: dict[int | None, list[int]] = {}
        for index, ask in enumerate(asks):
            groups.setdefault(None if ask.deterministic else ask.seed, []).append(index)
        decisions: list[Decision | InputError | None] = [None] * len(asks)
        for indices in groups.values():
            for index, decision in zip(indices, self._run_alike([asks[i] for i in indices]), strict=True):
                decisions[index] = decision
        return [decision for decision in decisions if decision is not None]

    def _run_alike(self, asks: Sequence[Ask]) -> list[Decision | InputError]:
        """Requests that are all deterministic, or all drawn with one seed."""
        first = asks[0]
        num_rows = first.num_rows if len(asks) == 1 else sum(ask.num_rows for ask in asks)
        actor = self._actor(num_rows)
        if not first.deterministic:
            actor.seed = first.seed
            actor.streams = torch.tensor([stream for ask in asks for stream in _streams(ask)])
            actor.positions = torch.tensor([position for ask in asks for position in _positions(ask)])
        if self.has_state:
            actor.state, actor.starts = self._gather_state(asks)
        step = actor.act(self._gather_obs(asks), deterministic=first.deterministic)
        state, actor.state = actor.state, {}
        action = step.env_action.numpy().copy()
        logprob = step.logprob.numpy().copy()
        value = None if step.value is None else step.value.numpy().copy()
        finite = bool(np.isfinite(logprob).all() and (value is None or np.isfinite(value).all()))
        finite = finite and bool(action.dtype.kind != "f" or np.isfinite(action).all())
        decisions: list[Decision | InputError] = []
        low = 0
        for ask in asks:
            high = low + ask.num_rows
            decision = Decision(action[low:high], logprob[low:high], None if value is None else value[low:high])
            if finite or _is_finite(decision):
                if ask.session is not None:
                    ask.session.advance({name: x[low:high].clone() for name, x in state.items()})
                decisions.append(decision)
            else:
                decisions.append(_overflow())
            low = high
        return decisions

    def _actor(self, num_rows: int) -> Actor:
        actor = self._actors.get(num_rows)
        if actor is None:
            actor = Actor(self.policy, num_rows, seed=0)
            actor.state = {}
            if num_rows <= self.max_rows:
                self._actors[num_rows] = actor
        return actor

    def _gather_obs(self, asks: Sequence[Ask]) -> Any:
        if len(asks) == 1:
            return asks[0].obs
        if self.interface.is_dict:
            return {spec.name: np.concatenate([ask.obs[spec.name] for ask in asks]) for spec in self.interface.inputs}
        return np.concatenate([ask.obs for ask in asks])

    def _gather_state(self, asks: Sequence[Ask]) -> tuple[dict[str, Tensor], Tensor]:
        parts, starts = [], []
        for ask in asks:
            if ask.session is None:
                parts.append(self.policy.initial_state(ask.num_rows))
                starts.append(np.ones(ask.num_rows, np.bool_))
            else:
                ask.session.fit(self.policy)
                parts.append(ask.session.state)
                starts.append(ask.session.starts if ask.reset is None else ask.session.starts | ask.reset)
        state = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return state, torch.from_numpy(np.concatenate(starts))


def _streams(ask: Ask) -> range:
    first = ask.first_stream if ask.session is None else ask.session.first_stream
    return range(first, first + ask.num_rows)


def _positions(ask: Ask) -> list[int]:
    return [0 if ask.session is None else ask.session.position] * ask.num_rows


def _is_finite(decision: Decision) -> bool:
    arrays = [decision.logprob, decision.action if decision.action.dtype.kind == "f" else decision.logprob]
    if decision.value is not None:
        arrays.append(decision.value)
    return all(bool(np.isfinite(array).all()) for array in arrays)


def _overflow() -> InputError:
    return InputError(
        f"{OBSERVATION}: the policy's output for it is not finite; its values are far outside those of training",
        field=OBSERVATION,
    )
