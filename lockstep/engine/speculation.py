"""Guesses of the next tokens. Noise is keyed by position, so a guess is checked against the very token that the sampler
draws there: the text is the one without guessing, at any temperature.
"""

from __future__ import annotations

from lockstep.engine.queue import Sequence

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
        self._trust = 4
        """Tokens guessed next time: doubled when all were right, else one more than were."""

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
                return tokens[found : found + min(most, self._trust)]
        return []

    def learn(self, num_guessed: int, num_right: int) -> None:
        """How the last guess fared."""
        if num_guessed:
            self._trust = 2 * num_guessed if num_right == num_guessed else num_right + 1


def propose(sequence: Sequence, most: int) -> list[int]:
    """The guesses for one sequence."""
    if sequence.lookup is None:
        sequence.lookup = PromptLookup()
    return sequence.lookup.propose(sequence.tokens, most)
