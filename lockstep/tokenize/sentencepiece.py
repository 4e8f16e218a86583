"""SentencePiece's byte-pair encoding with scores (Llama 2, Mistral, Gemma, Phi-3): the exact algorithm.

Among all neighbouring pairs whose join is a token, the join with the highest score is made first; of equal scores the
leftmost. Characters that end up in no token are spelt by their byte tokens. Source: Kudo and Richardson 2018, and the
behaviour of `sentencepiece` itself, which the vectors of the tests were made with.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence

from lockstep.tokenize.vocabulary import SPACE_MARK, Kind

_CACHE_ENTRIES = 1 << 16
_CACHE_LENGTH = 48  # longer pieces are rarely met twice
_WORDS = re.compile(f"{SPACE_MARK}*[^{SPACE_MARK}]+|{SPACE_MARK}+")
_CROSSING = re.compile(f"[^{SPACE_MARK}]{SPACE_MARK}")


class SpecialSplitter:
    """Cuts a text at the special tokens it contains: leftmost first, then longest.

    `strip_right` lists ids which swallow the whitespace that follows them.
    """

    def __init__(self, ids: dict[str, int], strip_right: frozenset[int] = frozenset()) -> None:
        self._ids = ids
        self._strip_right = strip_right
        self._by_first: dict[str, list[str]] = {}
        for text in sorted(ids, key=len, reverse=True):
            self._by_first.setdefault(text[0], []).append(text)
        first = "".join(re.escape(character) for character in self._by_first)
        self._first = re.compile(f"[{first}]") if first else None

    def split(self, text: str) -> list[str | int]:
        """Texts and special ids in order."""
        if self._first is None:
            return [text] if text else []
        parts: list[str | int] = []
        start = position = 0
        while candidate := self._first.search(text, position):
            position = candidate.start()
            special = next((s for s in self._by_first[text[position]] if text.startswith(s, position)), None)
            if special is None:
                position += 1
                continue
            if position > start:
                parts.append(text[start:position])
            parts.append(self._ids[special])
            start = position = position + len(special)
            if self._ids[special] in self._strip_right:
                while start < len(text) and text[start].isspace():
                    start += 1
                position = start
        if start < len(text):
            parts.append(text[start:])
        return parts


class SentencePieceEncoder:
    """Text to ids by scores.

    Args:
        tokens, scores, kinds: the vocabulary, one entry an id.
        unk_id: for characters that have neither a token nor byte tokens.
        add_space_prefix: put a space before the text and before what follows a special token.
        strip_right: special ids which swallow the whitespace after them.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        scores: Sequence[float],
        kinds: Sequence[int],
        *,
        unk_id: int | None,
        add_space_prefix: bool,
        strip_right: frozenset[int] = frozenset(),
    ) -> None:
        self._scores = scores
        self._add_space_prefix = add_space_prefix
        # A control token must never come out of ordinary text, so only these take part in joins.
        self._ids = {t: i for i, t in enumerate(tokens) if kinds[i] in (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)}
        self._byte_ids = {int(t[3:5], 16): i for i, t in enumerate(tokens) if kinds[i] == Kind.BYTE}
        self._unk_id = unk_id
        user = {t: i for i, t in enumerate(tokens) if kinds[i] == Kind.USER_DEFINED and t}
        control = {t: i for i, t in enumerate(tokens) if kinds[i] in (Kind.CONTROL, Kind.UNKNOWN) and t}
        self._user = SpecialSplitter(user, strip_right)
        self._special = SpecialSplitter({**user, **control}, strip_right)
        # If no join reaches over the border between a word and the next space mark, words are independent of each
        # other and can be cut apart and remembered without changing any id.
        self._by_word = not any(_CROSSING.search(t) for t in self._ids)
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a text, without bos or eos."""
        ids: list[int] = []
        for part in (self._special if parse_special else self._user).split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            spaced = " " + part if self._add_space_prefix else part
            ids.extend(self._encode_plain(spaced.replace(" ", SPACE_MARK)))
        return ids

    def encode_batch(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text, parse_special) for text in texts]

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in _WORDS.findall(text) if self._by_word else (text,):
            known = self._cache.get(word)
            if known is None:
                known = tuple(self._join(word))
                if len(word) <= _CACHE_LENGTH:
                    if len(self._cache) >= _CACHE_ENTRIES:
                        self._cache.clear()
                    self._cache[word] = known
            ids.extend(known)
        return ids

    def _join(self, text: str) -> list[int]:
        pieces = list(text)
        count = len(pieces)
        after = list(range(1, count + 1))
        before = list(range(-1, count - 1))
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            joined = pieces[left] + pieces[right]
            found = self._ids.get(joined)
            if found is not None:
                heapq.heappush(queue, (-self._scores[found], left, right, len(joined)))

        for left in range(count - 1):
            offer(left, left + 1)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            # Stale if either side was joined meanwhile: a swallowed piece is "", a grown one makes another length.
            if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != length:
                continue
            pieces[left] += pieces[right]
            pieces[right] = ""
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
                offer(left, after[left])
            if before[left] >= 0:
                offer(before[left], left)
        return [index for piece in pieces if piece for index in self._spell(piece)]

    def _spell(self, piece: str) -> list[int]:
        known = self._ids.get(piece)
        if known is not None:
            return [known]
        data = piece.encode()
        if all(byte in self._byte_ids for byte in data):
            return [self._byte_ids[byte] for byte in data]
        return [] if self._unk_id is None else [self._unk_id]
