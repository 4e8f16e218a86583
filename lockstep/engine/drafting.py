"""Guesses of a draft model: a small model of the same vocabulary writes a few tokens ahead, and the model served checks them
all in one pass.

The draft draws as the sampler does, with the same noise at the same position, so that it agrees as often as its
distribution allows; what is drawn in the end is the served model's own, whatever the draft says.

Its keys lie in a pool of its own under the page numbers of the served model's: a page holds the keys of the same tokens in
both, is shared, evicted and taken away in both at once, and there is nothing to allocate twice. In every step it reads what
the served model reads, so at most the step's own guesses are missing; a page is published once both have filled it.

Legend: T packed tokens, R rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from lockstep.core.errors import ConfigError
from lockstep.engine.config import EnginePlan
from lockstep.engine.pages import PageTable
from lockstep.engine.queue import Sequence
from lockstep.engine.runner import ServedModel, Span, batch_of
from lockstep.engine.sampler import Row, Sampler
from lockstep.engine.scheduler import Counters, Work


class Drafter:
    """Fills the guesses that works leave open.

    Args:
        sampler: the one that draws for the served model.

    Raises:
        ConfigError: a draft of another vocabulary, or one that does not reach as far as the engine's context.
    """

    def __init__(
        self,
        draft: ServedModel,
        plan: EnginePlan,
        vocab_size: int,
        table: PageTable,
        sampler: Sampler,
        counters: Counters,
    ) -> None:
        if draft.vocab_size != vocab_size:
            raise ConfigError(
                f"the draft model has {draft.vocab_size} tokens and the served model {vocab_size}; a draft must share "
                "the vocabulary: take one of the same family"
            )
        if draft.max_context < plan.max_context:
            raise ConfigError(
                f"the draft model knows {draft.max_context} positions and the engine's context has {plan.max_context}; "
                f"set max_context={draft.max_context} or less"
            )
        self.model = draft
        self._plan = plan
        self._table = table
        self._sampler = sampler
        self._counters = counters
        self._cache: Any = None
        self.wake()

    def wake(self) -> None:
        """Takes the memory of the draft's keys and values."""
        if self._cache is None:
            self._cache = self.model.new_cache(self._plan.num_pages, self._plan.draft_kv_dtype)

    def sleep(self) -> None:
        """Gives it back."""
        self._cache = None

    @torch.no_grad()
    def run(self, works: list[Work]) -> None:
        """Reads what the step reads, then writes ahead until every work has the guesses it was promised."""
        spans, drawing = [], []
        for work in works:
            sequence = work.sequence
            end = sequence.num_computed + work.count
            if sequence.num_drafted < end:
                spans.append(Span(sequence.slot, sequence.num_drafted, sequence.tokens[sequence.num_drafted : end]))
                sequence.num_drafted = end
                if work.num_open:
                    drawing.append((len(spans) - 1, work))
        while spans:
            hidden_TE, last_rows = self._read(spans)
            spans, going_on = [], []
            if drawing:
                rows = [Row(work.sequence, list(work.drafts)) for _, work in drawing]
                logits_RV = self.model.logits(hidden_TE[[last_rows[index] for index, _ in drawing]])
                picked = self._sampler.pick(logits_RV, rows)
                for index, ((_, work), token) in enumerate(zip(drawing, picked.tokens_R.tolist(), strict=True)):
                    if index in picked.errors:
                        continue
                    work.drafts.append(token)
                    if len(work.drafts) < work.num_open:
                        going_on.append((len(spans), work))
                        spans.append(self._ahead(work.sequence, token))
            drawing = going_on

    def _ahead(self, sequence: Sequence, token: int) -> Span:
        span = Span(sequence.slot, sequence.num_drafted, [token])
        sequence.num_drafted += 1
        return span

    def _read(self, spans: list[Span]) -> tuple[torch.Tensor, list[int]]:
        """(hidden states [T, E], the last row of each span)."""
        batch = batch_of(spans, self._table, self._plan.num_pages)
        self._counters.num_draft_computed_tokens += batch.num_tokens
        return self.model(batch, self._cache), (batch.seq_starts[1:] - 1).tolist()
