"""Decides what each step computes, and who holds which page.

One rule: a sequence has fewer computed than known tokens, and a step computes some of the difference within one budget
of tokens. Running texts come first (one token each), then pieces of prompts, then sequences that wait, then guesses.

Nothing starves: the running sequence first in order can take pages from all others, what it needs in all was checked
against the pool when it came, and the budget always holds more than one token for each running text.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

from lockstep.core.batch import PAGE
from lockstep.core.errors import ServingError
from lockstep.engine.config import EnginePlan, Policy
from lockstep.engine.pages import PagePool, PageTable
from lockstep.engine.queue import Sequence, State, WaitingLine
from lockstep.engine.radix import Node, RadixTree
from lockstep.engine.speculation import Speculator


@dataclass(slots=True)
class Work:
    """What a step does for one sequence: `count` known tokens from its first uncomputed one on, then the guesses."""

    sequence: Sequence
    count: int
    draws: bool
    """All known tokens will be computed: the step draws the next one."""
    drafts: list[int] = field(default_factory=list)
    num_open: int = 0
    """Guesses that the draft model is to make, their pages in place."""


@dataclass
class Counters:
    """Since the engine was made."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    """Rows of forward passes, guesses included."""
    num_cached_tokens: int = 0
    """Tokens whose keys came from the prefix cache instead."""
    num_generated_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    """Guesses that were the tokens drawn."""
    num_draft_computed_tokens: int = 0
    """Rows of the draft model's forward passes."""
    num_preemptions: int = 0
    num_finished: int = 0


class Scheduler:
    """The only owner of pages, slots, and the order of sequences."""

    def __init__(self, plan: EnginePlan) -> None:
        self.plan = plan
        self.pool = PagePool(plan.num_pages)
        self.tree = RadixTree(self.pool, plan.eviction, enabled=plan.prefix_cache)
        self.table = PageTable(plan.max_sequences, plan.pages_per_sequence)
        self.waiting = WaitingLine()
        self.running: list[Sequence] = []
        self.version = 0
        self.only_started = False
        """While the engine drains, nobody new starts."""
        self.counters = Counters()
        self.copy_pages: Callable[[list[int], list[int]], None] = _copy_nothing
        """Copies the keys and values of pages to others; the engine sets it."""
        self._arrivals = 0

    def next_order(self, priority: int, index: int) -> tuple[int, int, int]:
        """Place in line of sample `index` of a request; sample 0 makes it a new arrival."""
        self._arrivals += index == 0
        return (priority if self.plan.policy is Policy.PRIORITY else 0, self._arrivals, index)

    def submit(self, sequences: list[Sequence]) -> None:
        """Puts the samples of a request in line.

        Raises:
            ServingError: they would make the line longer than `max_queue`.
        """
        if len(self.waiting) + len(sequences) > self.plan.max_queue:
            raise ServingError(
                f"{len(self.waiting)} sequences wait and {len(sequences)} more came; the queue holds "
                f"max_queue={self.plan.max_queue}; try again later, or raise it"
            )
        for sequence in sequences:
            self.waiting.put(sequence)

    def plan_step(self, speculator: Speculator | None = None) -> list[Work]:
        """The work of the next step, pages already in place; empty when nothing can run."""
        budget, works = self.plan.max_step_tokens, []
        for sequence in tuple(self.running):
            # Making room may have preempted a later one.
            if (
                sequence.state is State.RUNNING
                and sequence.num_missing == 1
                and not sequence.awaits
                and self._make_room(sequence, len(sequence.tokens))
            ):
                works.append(Work(sequence, 1, True))
        num_decoding = len(works)
        budget -= num_decoding
        for sequence in self.running:
            if budget and (missing := sequence.num_missing) > 1 and not sequence.awaits:
                works.append(Work(sequence, min(missing, budget), missing <= budget))
                budget -= works[-1].count
        budget = self._admit(works, budget)
        if speculator is not None:
            for work in works[:num_decoding]:
                if budget and (most := speculator.most(work.sequence)):
                    self._draft(work, speculator, min(most, budget))
                    budget -= len(work.drafts) + work.num_open
        return works

    def advance(self, sequence: Sequence, num_computed: int) -> None:
        """The keys of so many tokens are in the cache; the pages this filled become everybody's."""
        sequence.num_computed = num_computed
        num_ready = min(num_computed, sequence.num_drafted) if self.plan.has_draft else num_computed
        while sequence.num_published < num_ready // PAGE and sequence.node is not None:
            self._publish_page(sequence, sequence.node, sequence.num_published)

    def preempt(self, sequence: Sequence) -> None:
        """Back in line, without pages. Those it filled stay in the prefix cache for as long as nobody needs the room."""
        self._drop_pages(sequence)
        self._put_back(sequence)

    def finish(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self._drop_pages(sequence)
            self._leave_slot(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED
        sequence.blocker = None
        self.counters.num_finished += 1

    def branch(self, sequence: Sequence, source: Sequence) -> None:
        """`sequence`, whose tokens are those of `source` now, goes on from its keys: full pages are shared, the last one
        is copied. Where either holds no pages, or none is left, it waits and is recomputed."""
        sequence.blocker = None
        if sequence.state is not State.RUNNING:
            return
        num_full, partial = divmod(source.num_computed, PAGE)
        self._drop_pages(sequence)
        if source.state is not State.RUNNING or self.pool.num_available < (partial > 0):
            self._put_back(sequence)
            return
        sequence.pages = source.pages[:num_full]
        self.pool.hold(sequence.pages)
        self.table.rows_SP[sequence.slot, :num_full] = sequence.pages
        if partial:
            self._extend(sequence, 1)
            self.copy_pages([source.pages[num_full]], [sequence.pages[num_full]])
        sequence.num_computed, sequence.num_published = source.num_computed, source.num_published
        sequence.num_drafted = min(source.num_drafted, num_full * PAGE)
        sequence.node = source.node
        if sequence.node is not None:
            self.tree.use(sequence.node)

    def set_version(self, version: int) -> None:
        """Pages of other weights are forgotten; a sequence that still reads some of them publishes no more."""
        self.version = version
        self.tree.flush()
        for sequence in self.running:
            sequence.node = None

    def audit(self) -> list[str]:
        """What does not add up between pages, tree, slots and sequences, in words. O(pages)."""
        cached = [node.page for node in self.tree.nodes() if node.page is not None]
        found = self.pool.audit([sequence.pages for sequence in self.running], cached) + self.tree.audit()
        if self.tree.num_nodes != len(cached):
            found.append(f"the tree counts {self.tree.num_nodes} nodes and has {len(cached)}")
        slots = [sequence.slot for sequence in self.running]
        if len(set(slots)) != len(slots) or len(slots) + self.table.num_free != self.plan.max_sequences:
            found.append(f"slots in use {slots} and {self.table.num_free} free of {self.plan.max_sequences}")
        for sequence in self.running:
            row = self.table.rows_SP[sequence.slot, : len(sequence.pages)].tolist()
            if row != sequence.pages:
                found.append(f"{sequence.request.id}: the page table reads {row}, the sequence holds {sequence.pages}")
            written = sequence.pages[sequence.num_computed // PAGE :]
            if any(self.pool.counts[page] != 1 for page in written):
                found.append(f"{sequence.request.id}: a page it will write is shared")
        found += [f"{sequence.request.id} waits and holds pages" for sequence in self.waiting if sequence.pages]
        if self.running != sorted(self.running, key=lambda sequence: sequence.order):
            found.append("running sequences are out of order")
        return found

    def _admit(self, works: list[Work], budget: int) -> int:
        """Starts those who wait, in order, as long as budget, slots and pages last; returns the budget left."""
        index = 0
        copies: tuple[list[int], list[int]] = ([], [])
        # Of samples whose leader is at the prompt: they come next, before it can have ended.
        num_reserved = 0
        while budget and index < len(self.waiting) and self.table.num_free > num_reserved:
            sequence = self.waiting[index]
            if self.only_started and not sequence.started:
                index += 1
            elif not sequence.is_blocked and self._start(sequence, copies):
                self.waiting.pop(index)
                missing = sequence.num_missing
                works.append(Work(sequence, min(missing, budget), missing <= budget))
                budget -= works[-1].count
            elif sequence.blocker is not None or sequence.rests or sequence.awaits:
                index += 1
                num_reserved += sequence.blocker is not None and sequence.blocker is sequence.leader
            else:
                break
        if copies[0]:
            self.copy_pages(*copies)
        return budget

    def _start(self, sequence: Sequence, copies: tuple[list[int], list[int]]) -> bool:
        """Gives a waiting sequence its cached prefix, pages for all its known tokens, and a slot. What its leader has of
        the prompt beyond full pages is noted in `copies`, pages to read and to write. False: it is blocked by one that
        computes keys it will share, or the pages do not suffice."""
        pool, tree = self.pool, self.tree
        node: Node | None = None
        pages: list[int] = []
        if tree.enabled:
            node, pages = tree.match((*sequence.key, self.version), sequence.tokens, sequence.max_shared_pages)
            if self._find_blocker(sequence, node, len(pages)):
                return False
        pool.hold(pages)
        need = (len(sequence.tokens) + PAGE - 1) // PAGE - len(pages)
        # A spare page for each running text, or the newcomer would soon be preempted again.
        if pool.num_available < need + len(self.running):
            pool.drop(pages)
            if node is not None:
                tree.release(node)
            return False
        sequence.num_published, sequence.num_computed = len(pages), len(pages) * PAGE
        sequence.num_drafted = sequence.num_computed
        sequence.pages = pages
        sequence.slot = self.table.take()
        self.table.rows_SP[sequence.slot, : len(pages)] = pages
        self._extend(sequence, need)
        shared = sequence.num_published
        if (leader := _leader(sequence, node, shared)) is not None:
            copies[0].append(leader.pages[shared])
            copies[1].append(sequence.pages[shared])
            sequence.num_computed = sequence.num_in_common
        sequence.node = node
        if node is not None:
            tree.use(node)
        if not sequence.started:
            sequence.started = True
            sequence.sample.num_cached = sequence.num_computed
        self.counters.num_cached_tokens += sequence.num_computed
        sequence.state = State.RUNNING
        bisect.insort(self.running, sequence, key=lambda other: other.order)
        return True

    def _find_blocker(self, sequence: Sequence, node: Node, depth: int) -> bool:
        """Whether a running prefill stands where this one would start and goes the same way for at least a page, or is
        the leader's and has not come to the end of the prompt."""
        leader = _leader(sequence, node, depth)
        if leader is not None and leader.num_computed < sequence.num_in_common:
            sequence.blocker, sequence.blocked_tokens = leader, sequence.num_in_common
            return True
        limit = sequence.max_shared_pages
        if depth >= limit:
            return False
        tokens = sequence.tokens
        for other in self.running:
            if other.node is not node or other.num_missing <= 1:
                continue
            end = depth
            most = min(limit, len(other.tokens) // PAGE)
            while end < most and tokens[end * PAGE : (end + 1) * PAGE] == other.tokens[end * PAGE : (end + 1) * PAGE]:
                end += 1
            if end > depth:
                sequence.blocker, sequence.blocked_tokens = other, end * PAGE
                return True
        return False

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for so many tokens, if need be from those later in order. False: it was itself the last and went."""
        need = (num_tokens + PAGE - 1) // PAGE - len(sequence.pages)
        if need <= 0:
            return True
        while self.pool.num_available < need:
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return False
        self._extend(sequence, need)
        return True

    def _draft(self, work: Work, speculator: Speculator, most: int) -> None:
        """Guesses that fit budget, context and the pages that are there; nobody is preempted for a guess."""
        sequence, known = work.sequence, len(work.sequence.tokens)
        room = (len(sequence.pages) + self.pool.num_available) * PAGE - known
        most = min(most, room, sequence.max_known - known - 1)
        if most <= 0:
            return
        work.drafts, work.num_open = speculator.propose(sequence, most)
        num_new = len(work.drafts) + work.num_open
        self._extend(sequence, (known + num_new + PAGE - 1) // PAGE - len(sequence.pages))

    def _extend(self, sequence: Sequence, num: int) -> None:
        if num <= 0:
            return
        if num > self.pool.num_free:
            self.tree.evict(num - self.pool.num_free)
        pages, start = self.pool.take(num), len(sequence.pages)
        sequence.pages += pages
        self.table.rows_SP[sequence.slot, start : start + num] = pages

    def _publish_page(self, sequence: Sequence, node: Node, index: int) -> None:
        block, page = tuple(sequence.tokens[index * PAGE : (index + 1) * PAGE]), sequence.pages[index]
        child = self.tree.insert(node, block, page)
        assert child.page is not None
        if child.page != page:
            # Somebody computed the same tokens before: the bits are equal, one copy is enough.
            self.pool.hold([child.page])
            self.pool.drop([page])
            sequence.pages[index] = child.page
            self.table.rows_SP[sequence.slot, index] = child.page
        sequence.node = child
        sequence.num_published = index + 1

    def _drop_pages(self, sequence: Sequence) -> None:
        self.pool.drop(sequence.pages)
        if sequence.node is not None:
            self.tree.release(sequence.node)
        sequence.pages, sequence.node = [], None
        sequence.num_computed = sequence.num_drafted = sequence.num_published = 0

    def _leave_slot(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.table.give_back(sequence.slot)

    def _put_back(self, sequence: Sequence) -> None:
        self._leave_slot(sequence)
        sequence.state = State.WAITING
        self.waiting.put(sequence)
        self.counters.num_preemptions += 1


def _copy_nothing(sources: list[int], targets: list[int]) -> None:
    raise AssertionError("nobody copies pages here")


def _leader(sequence: Sequence, node: Node | None, depth: int) -> Sequence | None:
    """Sample 0 of the request, if it runs with these weights and the prompt ends within the page after `depth`."""
    leader, common = sequence.leader, sequence.num_in_common
    if node is None or leader is None or leader.state is not State.RUNNING or leader.node is None:
        return None
    return leader if 0 < common - depth * PAGE < PAGE else None
