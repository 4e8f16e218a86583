"""Guesses of the next tokens. Noise is keyed by position, so a guess is checked against the very token that the sampler
draws there: the text is the one without guessing, at any temperature.
"""

from __future__ import annotations

from lockstep.engine.queue import Sequence
from lockstep.tokenize.grammar_host import MOST_FORCED

_LENGTHS = (4, 3, 2)
"""Runs of tokens that are looked up, the longest first."""


class PromptLookup:
    """Guesses that the last few tokens go on as they did when they came before (Saxena 2023, prompt lookup decoding).

    >>> lookup = PromptLookup()
    >>> lookup.propose([5, 6, 7, 8, 9, 5, 6, 7], 2)
    [8, 9]
    """

    def __init__(self) -> None:
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in _LENGTHS]
        self._num_read = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens after `tokens`, which only grow from call to call."""
        # The last token ends no run yet that could be found again: it is read at the next call.
        for end in range(self._num_read + 1, len(tokens)):
            for ends, length in zip(self._ends, _LENGTHS, strict=True):
                if end >= length:
                    ends[tuple(tokens[end - length : end])] = end
        self._num_read = max(self._num_read, len(tokens) - 1)
        for ends, length in zip(self._ends, _LENGTHS, strict=True):
            found = ends.get(tuple(tokens[-length:]))
            if found is not None:
                return tokens[found : found + most]
        return []


class Speculator:
    """Who guesses for a sequence, and how far ahead.

    Args:
        max_tokens: guessed ahead at most, beside those that a grammar forces.
        has_draft: a draft model guesses, else prompt lookup does.
    """

    def __init__(self, max_tokens: int, *, has_draft: bool) -> None:
        self.max_tokens = max_tokens
        self.has_draft = has_draft

    def most(self, sequence: Sequence) -> int:
        """The most guesses that this sequence can have in a step; a beam's next token is not known by drawing one."""
        if sequence.beams is not None:
            return 0
        return max(self.max_tokens, MOST_FORCED if sequence.shaper is not None else 0)

    def propose(self, sequence: Sequence, most: int) -> tuple[list[int], int]:
        """(guesses, how many the draft model is to make instead): what a grammar leaves no choice about comes first."""
        forced = sequence.shaper.forced(most) if sequence.shaper is not None else []
        most = min(most, self.max_tokens, sequence.trust)
        if forced or most == 0:
            return forced, 0
        if self.has_draft:
            return [], most
        if sequence.lookup is None:
            sequence.lookup = PromptLookup()
        return sequence.lookup.propose(sequence.tokens, most), 0


def learn(sequence: Sequence, num_guessed: int, num_right: int) -> None:
    """How the last guess fared: the next is twice as long when all was right, else one longer than what was."""
    if num_guessed:
        sequence.trust = 2 * num_guessed if num_right == num_guessed else num_right + 1
