"""What one forward pass of a language model reads beside its weights: the packed tokens of a step and where their keys
and values live. The trainer and the engine make the same object.

Legend: T packed tokens, S sequences, P pages of a sequence, R rows whose logits are wanted, X places of the sequences laid
out whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lockstep.core.adapters import AdapterRun, RowAdapter
from lockstep.core.errors import InputError

PAGE = 16
"""Tokens in a page of the key-value cache, and keys in a tile of attention: positions 16 p .. 16 p + 15 lie in one page."""


SHARED = 0.9
"""A training step computes beginnings that its sequences share once, where that leaves at most this part of the rows."""


@dataclass(frozen=True, kw_only=True)
class SharedRows:
    """Whole sequences some of which begin alike, such as the samples of one prompt: a token whose prefix is the same has one
    row, which all of them read. Only attention knows of it, for a row's bits depend on its prefix alone."""

    reads_X: Tensor
    """int64: the row of each token of the sequences laid out whole."""
    places_T: Tensor
    """int64: the first place that reads each row; rising."""
    seq_starts: Tensor
    """int32 [S + 1]: the rows that no sequence before has; they are the newest tokens of theirs."""
    whole: ForwardBatch
    """The same sequences with a row for each token."""


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """Sequences side by side. Sequence s owns rows seq_starts[s] .. seq_starts[s + 1] - 1, which are its newest tokens:
    after this step it has context_lens[s] keys, and its last row sits at position context_lens[s] - 1.

    >>> batch = ForwardBatch.packed([torch.tensor([5, 6, 7]), torch.tensor([8])])
    >>> batch.positions_T.tolist(), batch.seq_starts.tolist(), batch.context_lens.tolist()
    ([0, 1, 2, 0], [0, 3, 4], [3, 1])
    >>> batch.pages_SP.tolist()
    [[0], [1]]
    """

    tokens_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64: position of each token in its sequence, from 0."""
    seq_starts: Tensor
    """int32 [S + 1]: rising from 0 to T."""
    context_lens: Tensor
    """int32 [S]: keys each sequence has once this step has written its own."""
    pages_SP: Tensor
    """int32: page that holds positions 16 p .. of sequence s; entries past the context are not read."""
    num_pages: int
    """Pages of the pool that `pages_SP` points into."""
    rows_R: Tensor | None = None
    """int64: rows whose logits are wanted, rising; None for all T."""
    adapters: tuple[AdapterRun, ...] = ()
    """Which rows go through which low-rank adapter, rising; rows in none go through the base model alone."""
    shared: SharedRows | None = None
    """Set where T rows stand for more tokens; `seq_starts` then counts places of the sequences laid out whole."""
    known_longest: int | None = None
    """The largest of `context_lens` where whoever made the batch knows it."""

    @staticmethod
    def packed(sequences: Sequence[Tensor], adapter: RowAdapter | None = None) -> ForwardBatch:
        """Whole sequences from position 0, each with consecutive pages of a pool of their own: a training step.

        Args:
            adapter: for all rows; None: the base model.

        Raises:
            InputError: no sequence, or one without tokens.
        """
        lengths = [len(sequence) for sequence in sequences]
        if not lengths or min(lengths) == 0:
            raise InputError(f"sequences have lengths {lengths}; expected at least one, each of a token or more")
        counts = [(length + PAGE - 1) // PAGE for length in lengths]
        pages, first = torch.zeros(len(lengths), max(counts), dtype=torch.int32), 0
        for row, count in zip(pages, counts, strict=True):
            row[:count] = torch.arange(first, first + count, dtype=torch.int32)
            first += count
        device = sequences[0].device
        return ForwardBatch(
            tokens_T=torch.cat([sequence.to(torch.int64) for sequence in sequences]),
            positions_T=torch.cat([torch.arange(length, device=device) for length in lengths]),
            seq_starts=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device),
            context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            pages_SP=pages.to(device),
            num_pages=first,
            known_longest=max(lengths),
        ).with_adapter(adapter)

    def with_adapter(self, adapter: RowAdapter | None) -> ForwardBatch:
        """The same tokens, all of them through `adapter`; None: through the base model, as a reference policy is."""
        return replace(self, adapters=() if adapter is None else (AdapterRun(0, self.num_tokens, adapter),))

    def sharing(self) -> ForwardBatch:
        """Whole sequences with a row for each distinct prefix; this batch itself where few begin alike.

        >>> batch = ForwardBatch.packed([torch.tensor([5, 6, 7]), torch.tensor([5, 6, 8])]).sharing()
        >>> batch.tokens_T.tolist(), batch.positions_T.tolist(), batch.shared.reads_X.tolist()
        ([5, 6, 7, 8], [0, 1, 2, 2], [0, 1, 2, 0, 1, 3])
        """
        rows: dict[tuple[int, int], int] = {}
        reads, places, starts = list[int](), list[int](), [0]
        tokens = self.tokens_T.tolist()
        for first, last in itertools.pairwise(self.seq_starts.tolist()):
            row, place = -1, first
            while place < last and (known := rows.get((row, tokens[place]))) is not None:
                row, place = known, place + 1
                reads.append(row)
            # From here on every prefix is new.
            new = range(len(places), len(places) + last - place)
            rows.update(zip(zip([row, *new][: len(new)], tokens[place:last], strict=True), new, strict=True))
            reads += new
            places += range(place, last)
            starts.append(len(places))
        if len(places) > SHARED * len(reads):
            return self
        places_T = torch.tensor(places, device=self.tokens_T.device)
        shared = SharedRows(
            reads_X=torch.tensor(reads, device=places_T.device),
            places_T=places_T,
            seq_starts=torch.tensor(starts, dtype=torch.int32, device=places_T.device),
            whole=self,
        )
        tokens_T, positions_T = (x.index_select(0, places_T) for x in (self.tokens_T, self.positions_T))
        return replace(self, tokens_T=tokens_T, positions_T=positions_T, shared=shared)

    @property
    def longest(self) -> int:
        """Keys of the longest sequence."""
        return int(self.context_lens.max()) if self.known_longest is None else self.known_longest

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_T.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.context_lens.shape[0])
