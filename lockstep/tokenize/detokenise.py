"""Ids to text while they are generated: whole characters only, and stop strings across pieces."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.core.errors import InputError
from lockstep.tokenize.automaton import Finder
from lockstep.tokenize.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDecoder:
    """Text of ids one by one. The pieces joined are `Tokenizer.decode` of all ids.

    At most the three bytes of a character that is still open are held back, so a push costs the length of its token
    and a character never appears by halves. Bytes that cannot be UTF-8 whatever follows come out as U+FFFD; a
    character left open at the end does so in `flush`.

    Args:
        tokenizer: gives the bytes of each id.
        skip_special: leave control tokens out.
        continuing: the ids go on from an earlier text (a prompt), so that SentencePiece's first space is real.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continuing: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip = tokenizer.vocabulary.strip_first_space and not continuing
        self._utf8 = _Utf8Decoder(errors="replace")

    def push(self, index: int) -> str:
        """The characters that this id completes; "" if none."""
        if self._skip_special and self._tokenizer.is_special(index):
            return ""
        data = self._tokenizer.token_bytes(index)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: "" or one U+FFFD for a character that never was completed."""
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True)
class StopResult:
    """Text to hand on and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Ends a text at the first stop string, wherever the pieces are cut.

    Only text that may still become a stop string is held back. Of several stops the one that is complete first
    counts; of those that end together, the longest. After a stop, everything further is dropped.

    Args:
        stops: the stop strings; none of them empty.
        include_stop: hand on the stop string itself.

    Raises:
        InputError: an empty stop string.

    >>> matcher = StopMatcher(["END"])
    >>> matcher.push("the E"), matcher.push("ND of it")
    (StopResult(text='the ', stop=None), StopResult(text='', stop='END'))
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        if "" in stops:
            raise InputError("an empty stop string would stop before the first token; leave it out", field="stop")
        self._finder = Finder(stops) if stops else None
        self._include_stop = include_stop
        self.stopped: str | None = None

    def push(self, text: str) -> StopResult:
        """Feed a piece of text."""
        if self.stopped is not None:
            return StopResult("", self.stopped)
        if self._finder is None:
            return StopResult(text)
        safe, stop, _ = self._finder.push(text)
        self.stopped = stop
        return StopResult(safe + stop if stop is not None and self._include_stop else safe, stop)

    def flush(self) -> str:
        """The text held back, when generation ends for another reason."""
        return "" if self._finder is None else self._finder.flush()
