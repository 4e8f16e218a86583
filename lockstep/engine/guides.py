"""What structured output may write next, as far as the engine knows it. A request's grammar runs in a process beside the
engine (`tokenize.grammar_host`), for it may take any time:

    request --> in line --(at most COMPILING at once)--> compiles --> its texts run
    a step's end     TAKE: the tokens drawn          -->  what is forced next, is the text complete; then masks
    before a pass    MASKS: of further guesses       -->  masks, while the model computes
                                                          `exchange` reads what has come, for as long as the step may wait

A text whose answer has not come is left out of the step (`Guide.is_waiting`, or its row is not drawn) and goes on in a later
one with the same answer, so that what it says depends on no clock. A process that is silent for `timeout_s`, or ends, ends
its own request with an error. Nothing is sent to a process that has not answered, so a full pipe cannot stop the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from multiprocessing.connection import wait
from typing import Any

from lockstep.core.errors import InputError, ServingError
from lockstep.tokenize.grammar import GrammarSpec
from lockstep.tokenize.grammar_host import BEGUN, COPY, END, ERROR, GONE, MASKS, READY, START, TAKE
from lockstep.tokenize.nursery import Host, Hosts

COMPILING = 2
"""Grammars that are compiled at the same time; they take processors from the model."""
START_S = 60.0
"""For a process to begin; the first waits for one that reads the vocabulary."""
GRACE_S = 0.01
"""How long a step waits for answers. An honest grammar's come within a millisecond, on a machine that is not overloaded."""
Mask = tuple[bytes, bool]
"""Which ids may come next, as `GrammarMatcher.mask`, and whether only the end can."""


class Phase(Enum):
    """Of a grammar's process."""

    IN_LINE = "in line"
    COMPILES = "compiles"
    OPEN = "open"
    ENDED = "ended"


class Guide:
    """Where one text stands in its grammar. Made by `Guides.open`."""

    def __init__(self, grammar: _Grammar, number: int) -> None:
        self._grammar = grammar
        self._number = number
        self._taken: list[int] = []
        """Tokens of the text that its process does not know yet."""
        self._num_untold = 0
        """Times that it was told of some and has not answered: what it says of masks meanwhile is of an earlier place."""
        self._masks: dict[tuple[int, ...], Mask | None] = {}
        """By the ids that follow the text; None: the grammar forbids them."""
        self._coming: tuple[int, ...] | None = None
        """The masks after these and their beginnings follow unasked."""
        self.is_waiting = True
        """Nothing can be planned for the text before its process has answered."""
        self.is_finished: bool | None = False
        """Only the end can follow; None: not known yet."""
        self.forced: list[int] = []
        """What must come next, as far as it is known."""
        self.error: InputError | None = None
        """Why the text cannot go on; its `field` names the grammar where that is at fault."""

    def observe(self, token: int) -> None:
        """The text goes on with this one."""
        self._taken.append(token)
        self._masks = {ids[1:]: mask for ids, mask in self._masks.items() if ids and ids[0] == token}
        known = self._masks.get(())
        self.is_finished = known[1] if known is not None else None
        self.is_waiting = True
        self.forced = []
        self._coming = None

    def ask(self, ahead: Sequence[int]) -> None:
        """The masks after `ahead` and each of its beginnings will be wanted."""
        is_coming = self._coming is not None and self._coming[: len(ahead)] == tuple(ahead)
        if not is_coming and not self.knows(ahead):
            self.commit()
            self._grammar.outbox.append((MASKS, self._number, tuple(ahead)))

    def knows(self, ahead: Sequence[int]) -> bool:
        """Whether they have come."""
        return all(tuple(ahead[:num]) in self._masks for num in range(len(ahead) + 1))

    def mask(self, ahead: Sequence[int]) -> bytes | None:
        """Which ids may follow after `ahead`; None where the grammar forbids `ahead` itself.

        Raises:
            InputError: the answer has not come within `GRACE_S`.
        """
        ids = tuple(ahead)
        if ids not in self._masks:  # a draft model asks for what nobody could foresee
            self.ask(ids)
            self._grammar.exchange(GRACE_S, masks=True)
        if ids not in self._masks:
            raise self.error or InputError("the grammar cannot go on yet: it has not answered")
        found = self._masks[ids]
        return found[0] if found is not None else None

    def copy(self) -> Guide:
        """Another text that is at the same place."""
        self.commit()
        other = self._grammar.text()
        self._grammar.outbox.append((COPY, other._number, self._number))
        other._masks, other.forced = dict(self._masks), self.forced[:]  # what is coming comes to this one only
        other.is_waiting, other.is_finished, other.error = self.is_waiting, self.is_finished, self.error
        return other

    def close(self) -> None:
        """The text has ended."""
        self._grammar.texts.pop(self._number, None)
        self._grammar.outbox.append((END, self._number))

    def commit(self) -> None:
        """Tell the process, at its next message, what was observed."""
        if self._taken:
            self._grammar.outbox.append((TAKE, self._number, self._taken))
            self._taken = []
            self._num_untold += 1

    def answer(self, word: str, given: Sequence[Any]) -> None:
        """What the process said of this text."""
        if word == ERROR:
            self.fail(InputError(given[0], field=self._grammar.spec.kind))
        elif word == TAKE:
            self._num_untold -= 1
            if self._is_behind:
                return
            self.forced, self.is_finished = given
            self._coming = tuple(self.forced) if not self.is_finished else None
            self.is_waiting = False
        elif not self._is_behind:
            ids, masks = given
            self._coming = None
            for num in range(len(ids) + 1):
                self._masks[ids[:num]] = masks[num] if num < len(masks) else None
            self.is_waiting = False

    @property
    def _is_behind(self) -> bool:
        """The process has yet to answer for tokens of the text."""
        return bool(self._taken) or self._num_untold > 0

    def hold(self) -> None:
        """What was asked for has not come: leave the text out until it has."""
        self.is_waiting = True

    def fail(self, error: InputError) -> None:
        """It cannot go on."""
        self.error, self.is_waiting = error, False


class _Grammar:
    """The owner's side of one process."""

    def __init__(self, spec: GrammarSpec, order: tuple[int, ...], exchange: Callable[..., None]) -> None:
        self.spec = spec
        self.order = order
        self.exchange = exchange
        self.phase = Phase.IN_LINE
        self.texts: dict[int, Guide] = {}
        self.outbox: list[tuple[Any, ...]] = []
        self.host: Host | None = None
        self.since: float | None = None
        """When the message was sent that it has not answered; None: it waits for one."""
        self.has_begun = False
        self.is_slow = False
        """A step has waited for that answer in vain."""
        self._num_texts = 0

    @property
    def is_awaited(self) -> bool:
        """One of its texts cannot be planned for."""
        return any(guide.is_waiting for guide in self.texts.values())

    def text(self) -> Guide:
        self._num_texts += 1
        guide = self.texts[self._num_texts] = Guide(self, self._num_texts)
        return guide

    def launch(self, hosts: Hosts) -> None:
        try:
            self.host = hosts.open(self.spec)
        except ServingError as error:
            self.end(InputError(str(error)))
            return
        self.phase, self.since, self.is_slow = Phase.COMPILES, time.monotonic(), True

    def flush(self) -> None:
        """Sends what there is to say, unless an answer is due."""
        for guide in self.texts.values():
            guide.commit()
        if self.phase is not Phase.OPEN or self.since is not None or not self.outbox:
            return
        assert self.host is not None
        try:
            self.host.pipe.send(self.outbox)
        except OSError:
            self._lost()
            return
        self.outbox, self.since = [], time.monotonic()

    def read(self) -> None:
        """Its answer has come."""
        assert self.host is not None
        self.since, self.is_slow = None, False
        try:
            answer = self.host.pipe.recv()
        except Exception:  # its end, or what a process that was led astray writes
            self._lost()
            return
        if self.phase is Phase.OPEN:
            answers, more_follow = answer
            self.since = time.monotonic() if more_follow else None
            for word, number, *given in answers:
                if number in self.texts:
                    self.texts[number].answer(word, given)
        elif answer == BEGUN:
            self.since, self.is_slow, self.has_begun = time.monotonic(), True, True
        elif answer == GONE:
            self.end(InputError("a process for the grammar cannot be had; try again later"))
        elif answer == READY:
            self.phase = Phase.OPEN
            for guide in self.texts.values():
                guide.is_waiting = False
        else:
            self.end(InputError(answer, field=self.spec.kind))

    def end(self, error: InputError) -> None:
        """Its texts cannot go on."""
        self.phase, self.since = Phase.ENDED, None
        for guide in self.texts.values():
            guide.fail(error)
        if self.host is not None:
            self.host.close()

    def _lost(self) -> None:
        self._end_excess("more memory, processor time or nesting than a grammar may; use", "")

    def overdue(self, timeout_s: float) -> None:
        """Ends it where it has been silent for so long."""
        if self.since is None:
            return
        if not self.has_begun and time.monotonic() - self.since > START_S:
            self.end(InputError(f"the process for the grammar has not begun within {START_S:g} s; try again later"))
        elif self.has_begun and time.monotonic() - self.since > timeout_s:
            self._end_excess(f"over {timeout_s:g} s; use", ", or let the operator raise grammar_timeout_s")

    def _end_excess(self, what: str, else_do: str) -> None:
        doing = "compiling it" if self.phase is Phase.COMPILES else "a token of its text"
        self.end(
            InputError(
                f"the {self.spec.kind} cannot be used: {doing} took {what} fewer, shorter or less nested repetitions, rules "
                f"and alternatives{else_do}",
                field=self.spec.kind,
            )
        )


class Guides:
    """All grammars of an engine.

    Args:
        hosts: makes where their processes come from, when the first is needed.
        timeout_s: for an answer; compiling is one.
        most: processes at the same time.
    """

    def __init__(self, hosts: Callable[[], Hosts], *, timeout_s: float, most: int) -> None:
        self._make_hosts = hosts
        self._hosts: Hosts | None = None
        self._timeout_s = timeout_s
        self._most = most
        self._grammars: list[_Grammar] = []

    def open(self, spec: GrammarSpec, order: tuple[int, ...]) -> Guide:
        """The guide of a text at its start; further texts of the request are copies of it.

        Args:
            order: the lowest is compiled first.

        Raises:
            ConfigError, MissingExtraError: this engine has no structured output.
        """
        if self._hosts is None:
            self._hosts = self._make_hosts()
        grammar = _Grammar(spec, order, self.exchange)
        self._grammars.append(grammar)
        guide = grammar.text()
        grammar.outbox.append((START, guide._number))
        return guide

    def close(self, guides: Iterable[Guide]) -> None:
        """The request of these has ended."""
        for guide in guides:
            guide.close()
        for grammar in [grammar for grammar in self._grammars if not grammar.texts]:
            self._grammars.remove(grammar)
            if grammar.phase is not Phase.ENDED:
                grammar.end(InputError("its request has ended"))

    @property
    def is_waiting(self) -> bool:
        """Whether a text cannot be planned for."""
        return any(grammar.is_awaited for grammar in self._grammars)

    def exchange(self, wait_s: float, *, masks: bool = False, idle: bool = False) -> None:
        """Says what there is to say and reads what comes within `wait_s`.

        Args:
            masks: wait for masks too; else only for what planning needs.
            idle: the step has nothing else to do: wait for slow ones too, until one has answered.
        """
        self._launch()
        for grammar in self._grammars:
            grammar.flush()
        deadline = time.monotonic() + wait_s
        while due := {grammar.host.pipe: grammar for grammar in self._grammars if grammar.since and grammar.host}:
            awaited = [g for g in due.values() if idle or (not g.is_slow and (masks or g.is_awaited))]
            left = deadline - time.monotonic() if awaited else 0.0
            come = wait(list(due), max(left, 0.0))
            for pipe in come:
                due[pipe].read()  # type: ignore[index]
                due[pipe].flush()  # type: ignore[index]
            if not come or idle:
                for grammar in awaited:
                    grammar.is_slow = grammar.since is not None
                break
        for grammar in self._grammars:
            grammar.overdue(self._timeout_s)
        self._launch()

    def _launch(self) -> None:
        waiting = sorted((g for g in self._grammars if g.phase is Phase.IN_LINE), key=lambda grammar: grammar.order)
        num_compiling = sum(grammar.phase is Phase.COMPILES for grammar in self._grammars)
        num_live = num_compiling + sum(grammar.phase is Phase.OPEN for grammar in self._grammars)
        assert self._hosts is not None or not waiting
        for grammar in waiting[: max(0, min(COMPILING - num_compiling, self._most - num_live))]:
            grammar.launch(self._hosts)  # type: ignore[arg-type]
