"""Finding any of several strings in text that arrives in pieces, one step a character (Aho and Corasick 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Automaton:
    """States of a search for `words`; state 0 is "nothing begun".

    `depth[state]` is how many of the last characters may still become a word; `ends[state]` is the index of the
    longest word that ends here, or None.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._steps: list[dict[str, int]] = [{}]
        self._back = [0]
        self.depth = [0]
        self.ends: list[int | None] = [None]
        for number, word in enumerate(self.words):
            self._insert(word, number)
        self._link()

    def _insert(self, word: str, number: int) -> None:
        state = 0
        for character in word:
            following = self._steps[state].get(character)
            if following is None:
                following = len(self._steps)
                self._steps[state][character] = following
                self._steps.append({})
                self._back.append(0)
                self.depth.append(self.depth[state] + 1)
                self.ends.append(None)
            state = following
        if self.ends[state] is None:
            self.ends[state] = number

    def _link(self) -> None:
        queue = deque(self._steps[0].values())
        while queue:
            state = queue.popleft()
            if self.ends[state] is None:
                self.ends[state] = self.ends[self._back[state]]
            for character, following in self._steps[state].items():
                self._back[following] = self.step(self._back[state], character)
                queue.append(following)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while character not in self._steps[state]:
            if state == 0:
                return 0
            state = self._back[state]
        return self._steps[state][character]


class Finder:
    """Text in pieces to text that is safe to hand on, up to the first word found.

    Of several matches the one that ends first counts, and of those the longest, so that the way the text is cut into
    pieces changes nothing.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._automaton = Automaton(words)
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """Feed a piece.

        Returns:
            The text that can be no part of a word, the word found or None, and what followed it in this piece.
        """
        automaton, state = self._automaton, self._state
        buffer = self._held + text
        begun = len(self._held)
        for offset in range(begun, len(buffer)):
            state = automaton.step(state, buffer[offset])
            number = automaton.ends[state]
            if number is not None:
                word = automaton.words[number]
                self._state, self._held = 0, ""
                return buffer[: offset + 1 - len(word)], word, buffer[offset + 1 :]
        cut = len(buffer) - automaton.depth[state]
        self._state, self._held = state, buffer[cut:]
        return buffer[:cut], None, ""

    def flush(self) -> str:
        """The text held back, at the end of everything."""
        held, self._held, self._state = self._held, "", 0
        return held
