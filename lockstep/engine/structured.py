"""The texts of an engine that have a grammar: their part of a step, see `guides`.

Legend: R rows drawn, E model width.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lockstep.engine.config import EnginePlan
from lockstep.engine.emission import Emitter, Output
from lockstep.engine.guides import GRACE_S, Guide, Guides
from lockstep.engine.queue import Sequence, State
from lockstep.engine.runner import Gathered
from lockstep.engine.scheduler import Scheduler, Work
from lockstep.tokenize.grammar_host import Limits
from lockstep.tokenize.nursery import Hosts, Nursery
from lockstep.tokenize.tokenizer import Tokenizer


class Structured:
    """Asks the grammars before a forward pass, hears them after it, and ends the texts that are complete or cannot go on."""

    def __init__(self, guides: Guides, emitter: Emitter, scheduler: Scheduler) -> None:
        self._guides = guides
        self._emitter = emitter
        self._scheduler = scheduler
        self._live: dict[str, list[Sequence]] = {}

    def add(self, sequences: list[Sequence]) -> None:
        """The texts of a request that came in."""
        if _guide(sequences[0]) is not None:
            self._live[sequences[0].request.id] = sequences

    def close(self, sequences: list[Sequence]) -> None:
        """The request of these has ended."""
        self._live.pop(sequences[0].request.id, None)
        self._guides.close(guide for sequence in sequences if (guide := _guide(sequence)) is not None)

    @property
    def is_waiting(self) -> bool:
        """Whether a text cannot be planned for until its grammar answers."""
        return self._guides.is_waiting

    def ask(self, works: list[Work]) -> None:
        """For the masks of the rows that will be drawn; they come while the model computes."""
        if self._live:
            for work in works:
                if work.draws and (guide := _guide(work.sequence)) is not None:
                    guide.ask(work.drafts)
            self._guides.exchange(0.0)

    def leave_out_late(self, works: list[Work], gathered: Gathered, hidden_RE: Tensor) -> Tensor:
        """Rows whose masks have not come are not drawn: a later step computes the last known token again. Returns the hidden
        states of the others."""
        if not self._live:
            return hidden_RE
        self._guides.exchange(GRACE_S, masks=True)
        for work in works:
            sequence, guide = work.sequence, _guide(work.sequence)
            if work.draws and guide is not None and not guide.knows(work.drafts):
                guide.hold()
                work.draws, work.count = False, work.count - 1
                sequence.num_drafted = min(sequence.num_drafted, len(sequence.tokens) - 1)
        drawn = {id(work.sequence) for work in works if work.draws}
        kept = [index for index, row in enumerate(gathered.draws) if id(row.sequence) in drawn]
        if len(kept) == len(gathered.draws):
            return hidden_RE
        gathered.draws = [gathered.draws[index] for index in kept]
        return hidden_RE[kept]

    def hear(self, outputs: list[Output], wait_s: float, *, idle: bool = False) -> Iterator[str]:
        """Reads what the grammars say within this time; see `Guides.exchange`. Texts that are complete with it, or cannot go
        on, end: the output of such a text's last token, if it is among `outputs`, becomes its last one, else another is put
        there. Yields the requests of texts that ended."""
        if not self._live:
            return
        self._guides.exchange(wait_s, idle=idle)
        last = {id(output.sample): output for output in outputs}
        for request_id, sequences in list(self._live.items()):
            num_ended = 0
            for sequence in sequences:
                if sequence.state is State.FINISHED or (text := self._settle(sequence)) is None:
                    continue
                num_ended += 1
                self._scheduler.finish(sequence)
                if sequence.ranking is None:
                    output = last.get(id(sequence.sample))
                    if output is None:
                        output = Output(sequence.sample, len(sequence.sample.tokens), 0, "", True)
                        outputs.append(output)
                    output.text, output.is_finished = output.text + text, True
            if num_ended or sequences[0].state is State.FINISHED:
                yield request_id

    def _settle(self, sequence: Sequence) -> str | None:
        """The text that was held back, of one that ends here; None: it goes on."""
        guide = _guide(sequence)
        assert guide is not None
        if sequence.beams is not None:
            if guide.error is not None:
                sequence.beams.fail(guide.error)
                sequence.beams.settle(self._scheduler)  # ends all of them
            return None
        if guide.error is not None:
            return self._emitter.fail(sequence, guide.error)
        text = self._emitter.settle(sequence) if sequence.num_generated else ""
        return text if sequence.sample.is_finished else None


def guides_of(plan: EnginePlan, vocab_size: int, tokenizer: Tokenizer | None, hosts: Hosts | None) -> Guides:
    """Of an engine; without `hosts` in processes forked from a `Nursery` of our own, which the first grammar starts."""

    def make() -> Hosts:
        assert tokenizer is not None, "requests with a grammar are refused without a tokenizer"
        return hosts or Nursery(tokenizer, vocab_size, Limits(cpu_s=plan.grammar_timeout_s))

    return Guides(make, timeout_s=3 * plan.grammar_timeout_s, most=plan.max_sequences)


def _guide(sequence: Sequence) -> Guide | None:
    return sequence.shaper.guide if sequence.shaper is not None else None
