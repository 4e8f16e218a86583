"""Draws the next token of each row, and says how probable it was. A row's outcome depends on that row only.

Legend: R rows, V vocabulary, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.core.request import Alternative
from lockstep.engine.queue import Sequence
from lockstep.kernels.logprobs import token_logprobs, top_logprobs
from lockstep.kernels.sampling import sample_tokens


@dataclass(slots=True)
class Row:
    """A row of logits: `sequence` goes on after its known tokens and these guesses."""

    sequence: Sequence
    ahead: list[int]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that a beam could go on with, and its log-probabilities: of the raw model, and after shaping."""

    token: int
    logprob: float
    sampling_logprob: float


@dataclass(slots=True)
class Draws:
    """Lists run parallel to the rows."""

    tokens: list[int]
    logprobs: list[float]
    """Of the raw model."""
    sampling_logprobs: list[float]
    """Of the distribution drawn from."""
    alternatives: list[tuple[Alternative, ...]]
    errors: dict[int, InputError]
    """Rows from which nothing can be drawn, and why; the lists hold anything there."""
    candidates: dict[int, list[Candidate]]
    """Of the rows of beams, the best first."""


@dataclass(slots=True)
class Picked:
    """The draws alone."""

    tokens_R: Tensor
    sampling_R: Tensor
    """Log-probabilities under the distribution drawn from."""
    logits_RV: Tensor
    """As given; a row from which nothing can be drawn is zeros."""
    shaped_RV: Tensor
    """After shaping."""
    errors: dict[int, InputError]


class Sampler:
    """Keeps the parameters of running sequences in arrays by slot, so that a step only gathers them."""

    def __init__(self, num_slots: int) -> None:
        self._floats_4S = np.zeros((4, num_slots), dtype=np.float32)
        self._top_k_S = np.zeros(num_slots, dtype=np.int64)
        self._seeds_S = np.zeros(num_slots, dtype=np.int64)
        self._bound: list[Sequence | None] = [None] * num_slots
        self._gathered_slots = b""
        self._gathered: tuple[Tensor, ...] = ()
        """Columns of the last rows, whose slots those are: a decoding step mostly has the rows of the one before."""

    def draw(self, logits_RV: Tensor, rows: list[Row]) -> Draws:
        """One token a row, as `pick`, and how probable it was."""
        picked = self.pick(logits_RV, rows)
        return Draws(
            tokens=picked.tokens_R.tolist(),
            logprobs=token_logprobs(picked.logits_RV, picked.tokens_R).tolist(),
            sampling_logprobs=picked.sampling_R.tolist(),
            alternatives=alternatives(picked.logits_RV, [row.sequence.request.params.num_logprobs for row in rows]),
            errors=picked.errors,
            candidates=_candidates(picked, rows),
        )

    def pick(self, logits_RV: Tensor, rows: list[Row]) -> Picked:
        """In order: shaping, then temperature and truncation, then a draw keyed by seed and position."""
        slots = np.empty(len(rows), dtype=np.int64)
        positions = np.empty(len(rows), dtype=np.int64)
        errors: dict[int, InputError] = {}
        shaped_RV = logits_RV
        for index, row in enumerate(rows):
            sequence = row.sequence
            if self._bound[sequence.slot] is not sequence:
                self._bind(sequence)
            slots[index] = sequence.slot
            positions[index] = len(sequence.tokens) + len(row.ahead)
            if sequence.shaper is not None:
                if shaped_RV is logits_RV:
                    shaped_RV = logits_RV.clone()
                try:
                    sequence.shaper.apply(shaped_RV[index], sequence.num_generated + len(row.ahead), row.ahead)
                except InputError as error:
                    errors[index] = error
        columns = self._columns(slots, positions)
        try:
            tokens_R, sampling_R = sample_tokens(shaped_RV, *columns)
        except InputError:
            # One bad row must not end the others: it is found, replaced and reported.
            shaped_RV, logits_RV = _without_bad_rows(shaped_RV, errors), _without_bad_rows(logits_RV, errors)
            tokens_R, sampling_R = sample_tokens(shaped_RV, *columns)
        return Picked(tokens_R, sampling_R, logits_RV, shaped_RV, errors)

    def _columns(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """What `sample_tokens` wants beside the logits, for rows of these slots."""
        names = slots.tobytes()
        if names != self._gathered_slots:
            temperature, top_p, min_p, typical_p = torch.from_numpy(self._floats_4S[:, slots])
            top_k, seeds = torch.from_numpy(self._top_k_S[slots]), torch.from_numpy(self._seeds_S[slots])
            self._gathered_slots, self._gathered = names, (temperature, top_k, top_p, min_p, typical_p, seeds)
        return (*self._gathered, torch.from_numpy(positions))

    def _bind(self, sequence: Sequence) -> None:
        params, slot = sequence.request.params, sequence.slot
        self._floats_4S[:, slot] = (params.temperature, params.top_p, params.min_p, params.typical_p)
        self._top_k_S[slot] = params.top_k
        self._seeds_S[slot] = sequence.sample.seed
        self._bound[slot] = sequence
        self._gathered_slots = b""


def _candidates(picked: Picked, rows: list[Row]) -> dict[int, list[Candidate]]:
    found: dict[int, list[Candidate]] = {}
    for index, row in enumerate(rows):
        beams = row.sequence.beams
        if beams is None or index in picked.errors:
            continue
        num = min(beams.num_candidates, picked.shaped_RV.shape[1])
        ids, values = (x[0] for x in top_logprobs(picked.shaped_RV[index : index + 1], num))
        raw = values
        if row.sequence.shaper is not None:
            raw = token_logprobs(picked.logits_RV[index].expand(num, -1).contiguous(), ids)
        triples = zip(ids.tolist(), raw.tolist(), values.tolist(), strict=True)
        found[index] = [Candidate(*triple) for triple in triples if triple[2] > -float("inf")]
    return found


def _without_bad_rows(logits_RV: Tensor, errors: dict[int, InputError]) -> Tensor:
    """Rows without a finite maximum become zeros and are noted."""
    top_R = logits_RV.amax(1)
    good_R = torch.isfinite(top_R)
    for index in (~good_R).nonzero().flatten().tolist():
        problem = f"the largest logit is {float(top_R[index])}; expected a finite number"
        errors.setdefault(index, InputError(problem))
    return torch.where(good_R[:, None], logits_RV, torch.zeros(()))


def alternatives(logits_RV: Tensor, nums: list[int]) -> list[tuple[Alternative, ...]]:
    """The most probable tokens of each row under the raw model, as many as each wants."""
    most = max(nums, default=0)
    if most == 0:
        return [()] * len(nums)
    wanting = [index for index, num in enumerate(nums) if num]
    ids, values = top_logprobs(logits_RV[wanting], most)
    found: list[tuple[Alternative, ...]] = [()] * len(nums)
    for index, row_ids, row_values in zip(wanting, ids.tolist(), values.tolist(), strict=True):
        pairs = zip(row_ids[: nums[index]], row_values, strict=False)
        found[index] = tuple(Alternative(token, value) for token, value in pairs)
    return found
