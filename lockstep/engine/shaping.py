"""What a request does to the logits of its own row before a token is drawn: penalties, bias, bans.

Legend: V vocabulary, U different tokens seen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.core.sampling import SamplingParams
from lockstep.engine.guides import Guide
from lockstep.tokenize.grammar import allowed
from lockstep.tokenize.tokenizer import Tokenizer


class Shaper:
    """The state of one sample's shaping: which tokens it has seen, how often it wrote them, what is banned."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        ending_ids: Sequence[int],
        guide: Guide | None = None,
        bad_sequences: Sequence[tuple[int, ...]] = (),
    ) -> None:
        """bad_sequences: those of `bad_words`; the last token of each is banned after the others."""
        self._params = params
        self._bad_sequences = tuple(bad_sequences)
        self._longest_bad = max(map(len, bad_sequences), default=1) - 1
        self._tail: list[int] = []
        """The tokens written last, as many as the longest of these sequences has before its last."""
        self.guide = guide
        """Where the sample stands in its grammar."""
        self._min_tokens = params.min_tokens
        self._ending = torch.tensor(sorted({*ending_ids, *params.stop_token_ids}), dtype=torch.int64)
        self._bias_ids = torch.tensor([token for token, _ in params.logit_bias], dtype=torch.int64)
        self._bias = torch.tensor([value for _, value in params.logit_bias], dtype=torch.float32)
        self._banned = _banned_ids(params, vocab_size)
        self._penalises = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        self._row_of: dict[int, int] = {}
        self._ids_U = np.empty(256, dtype=np.int64)
        self._counts_U = np.empty(256, dtype=np.float32)
        if self._penalises and params.repetition_penalty != 1.0:
            for token in prompt:
                self._see(token)

    @staticmethod
    def is_needed(params: SamplingParams) -> bool:
        plain = SamplingParams(
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            allowed_token_ids=params.allowed_token_ids,
            bad_token_ids=params.bad_token_ids,
            bad_words=params.bad_words,
            min_tokens=params.min_tokens,
        )
        return plain != SamplingParams()

    def copy(self) -> Shaper:
        """Of the same state, to go another way from."""
        other = copy.copy(self)
        other.guide = self.guide.copy() if self.guide is not None else None
        other._tail = self._tail[:]
        other._row_of, other._ids_U, other._counts_U = dict(self._row_of), self._ids_U.copy(), self._counts_U.copy()
        return other

    @property
    def is_complete(self) -> bool | None:
        """The grammar allows nothing but the end; None: it has not said yet."""
        return self.guide.is_finished if self.guide is not None else False

    def forced(self, most: int) -> list[int]:
        """The next tokens, as far as the grammar leaves no choice."""
        return self.guide.forced[:most] if self.guide is not None else []

    def observe(self, token: int) -> None:
        """The sample wrote this token."""
        if self._longest_bad:
            self._tail = [*self._tail, token][-self._longest_bad :]
        if self._penalises:
            self._counts_U[self._see(token)] += 1
        if self.guide is not None:
            self.guide.observe(token)

    def apply(self, logits_V: Tensor, num_generated: int, ahead: Sequence[int]) -> None:
        """Changes a row in place. Where bans and grammar together leave nothing, the grammar counts.

        Args:
            num_generated: tokens the sample has written, `ahead` included.
            ahead: guessed tokens that the row goes on from, not yet observed.

        Raises:
            InputError: the grammar cannot go on.
        """
        raw_V = logits_V.clone() if self.guide is not None else logits_V
        if self._penalises:
            self._penalise(logits_V, ahead)
        if len(self._bias_ids):
            logits_V.index_add_(0, self._bias_ids, self._bias)
        if self._banned is not None:
            logits_V.masked_fill_(self._banned, -torch.inf)
        if self._bad_sequences:
            written = [*self._tail, *ahead]
            for *before, last in self._bad_sequences:
                if written[len(written) - len(before) :] == before:
                    logits_V[last] = -torch.inf
        if num_generated < self._min_tokens and len(self._ending):
            logits_V[self._ending] = -torch.inf
        # A guess that the grammar forbids cannot be drawn, so nobody will ask for its row.
        if self.guide is not None and (mask := self.guide.mask(ahead)) is not None:
            banned_V = torch.from_numpy(allowed(~np.frombuffer(mask, dtype=np.int32), len(logits_V)))
            logits_V.masked_fill_(banned_V, -torch.inf)
            if torch.isneginf(logits_V.amax()):
                logits_V.copy_(raw_V).masked_fill_(banned_V, -torch.inf)

    def _penalise(self, logits_V: Tensor, ahead: Sequence[int]) -> None:
        before = len(self._row_of)
        for token in ahead:
            self._counts_U[self._see(token)] += 1
        num, params = len(self._row_of), self._params
        ids, counts = torch.from_numpy(self._ids_U[:num]), torch.from_numpy(self._counts_U[:num])
        values, factor = logits_V[ids], params.repetition_penalty
        values = torch.where(values > 0, values / factor, values * factor)
        values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        logits_V[ids] = values
        for token in ahead:
            self._counts_U[self._row_of[token]] -= 1
        for token in self._ids_U[before:num].tolist():
            del self._row_of[token]

    def _see(self, token: int) -> int:
        row = self._row_of.get(token)
        if row is None:
            row = self._row_of[token] = len(self._row_of)
            if row == len(self._ids_U):
                self._ids_U = np.concatenate([self._ids_U, np.empty_like(self._ids_U)])
                self._counts_U = np.concatenate([self._counts_U, np.empty_like(self._counts_U)])
            self._ids_U[row], self._counts_U[row] = token, 0
        return row


def _banned_ids(params: SamplingParams, vocab_size: int) -> Tensor | None:
    """bool [V], or None when nothing is banned for good."""
    if params.allowed_token_ids is None and not params.bad_token_ids:
        return None
    banned = torch.full((vocab_size,), params.allowed_token_ids is not None)
    banned[list(params.allowed_token_ids or ())] = False
    banned[list(params.bad_token_ids)] = True
    return banned


def bad_sequences(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens that spell each word at the start of a line and after a space; those that only begin with the tokens of
    one are other words."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        for text in (bare, " " + bare):
            ids = tuple(tokenizer.encode(text, add_special=False, parse_special=False))
            if ids:
                found[ids] = None
    return list(found)


def check_tokens(
    params: SamplingParams, vocab_size: int, ending_ids: Sequence[int], bad: Sequence[tuple[int, ...]] = ()
) -> None:
    """Whether every token a request names exists, and one is left to draw.

    Args:
        bad: token sequences of `bad_words`.

    Raises:
        InputError: naming the field.
    """
    for name, ids in (
        ("logit_bias", [token for token, _ in params.logit_bias]),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_token_ids", params.bad_token_ids),
        ("stop_token_ids", params.stop_token_ids),
    ):
        wrong = [token for token in ids if not 0 <= token < vocab_size]
        if wrong:
            raise InputError(f"{name} names token {wrong[0]}; expected 0 <= id < {vocab_size}", field=name)
    left = set(params.allowed_token_ids) if params.allowed_token_ids is not None else None
    single = [ids[0] for ids in bad if len(ids) == 1]
    banned = {*params.bad_token_ids, *single, *((*ending_ids, *params.stop_token_ids) if params.min_tokens else ())}
    num_left = len(left - banned) if left is not None else vocab_size - len(banned)
    if num_left == 0:
        raise InputError("every allowed token is banned too; leave at least one to draw", field="allowed_token_ids")
