"""From the work of a step to hidden states of the rows that are wanted.

Legend: T packed tokens, S sequences of the step, R rows wanted, E model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lockstep.core.adapters import AdapterRun, RowAdapter
from lockstep.core.batch import PAGE, ForwardBatch
from lockstep.engine.config import EnginePlan
from lockstep.engine.pages import PageTable
from lockstep.engine.queue import Sequence
from lockstep.engine.sampler import Row
from lockstep.engine.scheduler import Work


class ServedModel(Protocol):
    """What the engine reads of a `LanguageModel`; its cache is handed back to it unread."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    @property
    def precision(self) -> Any:
        """Its `kv_dtype` is what keys and values are stored in unless the config says otherwise."""

    def __call__(self, batch: ForwardBatch, cache: Any) -> Tensor:
        """Hidden states [T, E]."""

    def logits(self, hidden_RE: Tensor) -> Tensor: ...

    def new_cache(self, num_pages: int, dtype: torch.dtype) -> Any: ...


@dataclass(slots=True)
class Scored:
    """Rows first_row .. first_row + num - 1 give the log-probabilities of the prompt tokens after `position`."""

    sequence: Sequence
    position: int
    first_row: int
    num: int


@dataclass(slots=True)
class Gathered:
    """Which of the rows wanted are for whom, in the order of the works."""

    rows: list[int] = field(default_factory=list)
    draw_rows: list[int] = field(default_factory=list)
    """Places in `rows`."""
    draws: list[Row] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)


class Span(NamedTuple):
    """Neighbouring tokens of a sequence, the first of them at position `first`."""

    slot: int
    first: int
    tokens: list[int]


def batch_of(
    spans: list[Span],
    table: PageTable,
    num_pages: int,
    rows: list[int] | None = None,
    adapters: list[AdapterRun] | None = None,
) -> ForwardBatch:
    """Spans side by side, through the pages that the table has for their slots."""
    tokens: list[int] = []
    positions: list[int] = []
    starts, lengths = [0], []
    for _, first, new in spans:
        last = first + len(new)
        tokens += new
        positions += range(first, last)
        starts.append(len(tokens))
        lengths.append(last)
    longest = max(lengths)
    width = (longest + PAGE - 1) // PAGE
    return ForwardBatch(
        tokens_T=_int64(tokens),
        positions_T=_int64(positions),
        seq_starts=torch.from_numpy(np.array(starts, dtype=np.int32)),
        context_lens=torch.from_numpy(np.array(lengths, dtype=np.int32)),
        pages_SP=torch.from_numpy(table.rows_SP[[span.slot for span in spans], :width]),
        num_pages=num_pages,
        rows_R=None if rows is None else _int64(rows),
        adapters=tuple(adapters or ()),
        known_longest=longest,
    )


class Runner:
    """Makes the step's `ForwardBatch` out of the persistent table and runs the model."""

    def __init__(self, model: ServedModel, plan: EnginePlan, table: PageTable) -> None:
        self.model = model
        self.plan = plan
        self._table = table
        self._cache: Any = None
        self.wake()

    def wake(self) -> None:
        """Takes the memory of the key-value cache."""
        if self._cache is None:
            self._cache = self.model.new_cache(self.plan.num_pages, self.plan.kv_dtype)

    def sleep(self) -> None:
        """Gives it back."""
        self._cache = None

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """The keys and values of some pages to others, in every layer."""
        self._cache.copy_pages(sources, targets)

    def run(self, works: list[Work]) -> tuple[Tensor, Gathered]:
        """One forward pass: hidden states [R, E], and whose rows they are."""
        assert self._cache is not None, "the engine sleeps"
        batch, gathered = self._gather(works)
        hidden_TE = self.model(batch, self._cache)
        if len(gathered.rows) == batch.num_tokens:  # rows rise, so these are all of them
            return hidden_TE, gathered
        if not gathered.rows:
            return hidden_TE[:0], gathered
        assert batch.rows_R is not None
        return hidden_TE.index_select(0, batch.rows_R), gathered

    def _gather(self, works: list[Work]) -> tuple[ForwardBatch, Gathered]:
        spans, gathered, num_rows = [], Gathered(), 0
        adapters: list[AdapterRun] = []
        for work in works:
            sequence, first = work.sequence, work.sequence.num_computed
            _want(gathered, work, num_rows)
            tokens = sequence.tokens[first : first + work.count]
            if work.drafts:
                tokens += work.drafts
            spans.append(Span(sequence.slot, first, tokens))
            if sequence.adapter is not None:
                _extend_run(adapters, num_rows, num_rows + len(tokens), sequence.adapter.adapter)
            num_rows += len(tokens)
        return batch_of(spans, self._table, self.plan.num_pages, gathered.rows, adapters), gathered


def _extend_run(runs: list[AdapterRun], first: int, last: int, adapter: RowAdapter) -> None:
    """Rows first .. last - 1 take this adapter; neighbours of one adapter are one run."""
    if runs and runs[-1].adapter is adapter and runs[-1].last_row == first:
        first = runs.pop().first_row
    runs.append(AdapterRun(first, last, adapter))


def _int64(values: list[int]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _want(gathered: Gathered, work: Work, first_row: int) -> None:
    """Notes the rows of one work: prompt tokens to score, then the last known token and the guesses to draw after."""
    sequence, first = work.sequence, work.sequence.num_computed
    if sequence.is_scoring:
        begin, end = max(first, sequence.num_scored), min(first + work.count, sequence.num_prompt - 1)
        if begin < end:
            gathered.scored.append(Scored(sequence, begin, len(gathered.rows), end - begin))
            gathered.rows += range(first_row + begin - first, first_row + end - first)
    if work.draws:
        last = first_row + work.count - 1
        if not work.drafts:
            gathered.draw_rows.append(len(gathered.rows))
            gathered.rows.append(last)
            gathered.draws.append(Row(sequence, []))
            return
        for num in range(len(work.drafts) + 1):
            gathered.draw_rows.append(len(gathered.rows))
            gathered.rows.append(last + num)
            gathered.draws.append(Row(sequence, work.drafts[:num]))
