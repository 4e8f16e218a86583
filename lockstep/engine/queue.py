"""A sample on its way through the engine, and the line in which samples wait."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

from lockstep.core.batch import PAGE
from lockstep.core.request import Request, Sample

if TYPE_CHECKING:
    from lockstep.engine.adapters import LoadedAdapter
    from lockstep.engine.beams import Beams
    from lockstep.engine.emission import TextStream
    from lockstep.engine.radix import Node
    from lockstep.engine.ranking import Ranking
    from lockstep.engine.shaping import Shaper
    from lockstep.engine.speculation import PromptLookup

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class State(Enum):
    WAITING = "waiting"
    """Holds no page and no slot: new, or preempted."""
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The tokens known of a sample and how many of them have keys in the cache. Every step moves `num_computed` towards
    the number of known tokens; when it gets there a token is drawn. Chunked prefill, a prefix hit, a decode step, a
    recomputation after preemption and a verified guess are the same rule.
    """

    __slots__ = (
        "adapter",
        "beams",
        "blocked_tokens",
        "blocker",
        "leader",
        "lookup",
        "max_known",
        "node",
        "num_computed",
        "num_drafted",
        "num_prompt",
        "num_published",
        "num_scored",
        "order",
        "pages",
        "ranking",
        "request",
        "rests",
        "sample",
        "scores_prompt",
        "shaper",
        "slot",
        "started",
        "state",
        "text",
        "tokens",
        "trust",
    )

    def __init__(self, request: Request, sample: Sample, order: tuple[int, int, int], max_tokens: int) -> None:
        self.request = request
        self.sample = sample
        self.order = order
        """(priority, arrival, index): the lowest runs first and is preempted last."""
        self.tokens = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.max_known = self.num_prompt + max_tokens
        self.adapter: LoadedAdapter | None = None
        """None: the base model."""
        self.state = State.WAITING
        self.started = False
        self.num_computed = 0
        self.num_drafted = 0
        """Tokens whose keys are in the draft model's cache, where there is one."""
        self.num_scored = 0
        """Prompt tokens whose own row gave the log-probability of the next one."""
        self.scores_prompt = request.params.prompt_logprobs is not None and sample.index == 0
        """The samples of a request share one list of prompt log-probabilities; the first fills it."""
        self.pages: list[int] = []
        self.slot = 0
        self.node: Node | None = None
        """Where the published pages end in the prefix tree; None: this sequence publishes nothing."""
        self.num_published = 0
        self.leader: Sequence | None = None
        """Sample 0 of the request, whose keys of the prompt the others take; None for itself, and for beams."""
        self.blocker: Sequence | None = None
        self.blocked_tokens = 0
        self.shaper: Shaper | None = None
        self.ranking: Ranking | None = None
        """Who chooses among the sequences of the request; None: each is a sample."""
        self.beams: Beams | None = None
        """The same, where it is a beam search."""
        self.rests = False
        """A beam that has nothing to compute until the others have offered their continuations."""
        self.lookup: PromptLookup | None = None
        self.trust = 4
        """Tokens guessed next time; see `speculation.learn`."""
        self.text: TextStream | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Prefixes are shared among sequences of one key."""
        return self.request.cache_salt, self.adapter.key if self.adapter is not None else ""

    @property
    def num_missing(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def is_scoring(self) -> bool:
        """Log-probabilities of prompt tokens are still wanted."""
        return self.scores_prompt and self.num_scored < self.num_prompt - 1

    @property
    def max_shared_pages(self) -> int:
        """Pages that may come from the cache: the last token is always computed, for its logits, and so is a prompt
        token whose logits are wanted."""
        limit = (len(self.tokens) - 1) // PAGE
        return min(limit, self.num_scored // PAGE) if self.is_scoring else limit

    @property
    def num_in_common(self) -> int:
        """Tokens that are the leader's too: the prompt, but for a last token, which is always computed."""
        return min(self.num_prompt, len(self.tokens) - 1)

    @property
    def awaits(self) -> bool:
        """Its grammar has not said what may come next, nor whether anything may: such a sequence takes part in no step."""
        return self.shaper is not None and self.shaper.guide is not None and self.shaper.guide.is_waiting

    @property
    def is_blocked(self) -> bool:
        """Another sequence is computing keys which this one will share, it is a beam that rests, or awaits its grammar."""
        if self.rests or self.awaits:
            return True
        other = self.blocker
        if other is None:
            return False
        if other.state is State.RUNNING and other.node is not None and other.num_computed < self.blocked_tokens:
            return True
        self.blocker = None
        return False


class WaitingLine:
    """Sequences by `order`: a preempted one returns to its old place, ahead of everybody who came later."""

    def __init__(self) -> None:
        self._line: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    def __getitem__(self, index: int) -> Sequence:
        return self._line[index]

    def put(self, sequence: Sequence) -> None:
        bisect.insort(self._line, sequence, key=lambda other: other.order)

    def pop(self, index: int) -> Sequence:
        return self._line.pop(index)

    def remove(self, sequence: Sequence) -> None:
        self._line.remove(sequence)


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a request: the request's own for the first, far-apart ones for the others.

    >>> sample_seed(7, 0), sample_seed(7, 1) == sample_seed(8, 0)
    (7, False)
    """
    if index == 0:
        return seed
    value = (seed + index * _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return (value ^ (value >> 31)) >> 1
