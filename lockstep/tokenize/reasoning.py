"""Splitting what a model thinks (`<think>...</think>`) from what it answers, while the text arrives."""

from __future__ import annotations

import enum
from typing import final

from lockstep.core.errors import InputError
from lockstep.tokenize.automaton import Finder
from lockstep.tokenize.events import ContentDelta, Event, ReasoningDelta


class _Place(enum.Enum):
    START = enum.auto()
    REASONING = enum.auto()
    AFTER = enum.auto()
    CONTENT = enum.auto()


@final
class ReasoningSplitter:
    """Text in pieces to reasoning and content; how the text is cut changes nothing.

    The reasoning must come first. Blank space around it and before the answer belongs to the tags and is dropped.
    Text without a first tag is content as it stands; a tag that is never closed makes everything reasoning.

    Args:
        start, end: the tags.
        starts_inside: the prompt already holds the first tag (see `prompt_opens_reasoning`).

    >>> splitter = ReasoningSplitter()
    >>> splitter.push("<think>12 * 1") + splitter.push("2</think>\\n\\n144") + splitter.finish()
    [ReasoningDelta(text='12 * 1'), ReasoningDelta(text='2'), ContentDelta(text='144')]
    """

    def __init__(self, start: str = "<think>", end: str = "</think>", *, starts_inside: bool = False) -> None:
        if not start.strip() or not end.strip():
            raise InputError(f"reasoning tags {start!r} and {end!r}; expected two texts", field="reasoning")
        self._start = start
        self._end = Finder([end])
        self._place = _Place.REASONING if starts_inside else _Place.START
        self._held = ""  # START: what may be blank space and the tag; REASONING: blank space that may be its last
        self._begun = False

    def push(self, text: str) -> list[Event]:
        """The events that this piece makes certain."""
        if not text:
            return []
        if self._place is _Place.CONTENT:
            return [ContentDelta(text)]
        if self._place is _Place.AFTER:
            rest = text.lstrip()
            if not rest:
                return []
            self._place = _Place.CONTENT
            return [ContentDelta(rest)]
        return self._push_start(text) if self._place is _Place.START else self._push_reasoning(text)

    def finish(self) -> list[Event]:
        """The events of the text still held back."""
        place, self._place = self._place, _Place.CONTENT
        held, self._held = self._held, ""
        if place is _Place.START:
            return [ContentDelta(held)] if held else []
        if place is _Place.REASONING:
            rest = (held + self._end.flush()).rstrip()
            return [ReasoningDelta(rest if self._begun else rest.lstrip())] if rest.strip() else []
        return []

    def _push_start(self, text: str) -> list[Event]:
        self._held += text
        body = self._held.lstrip()
        if body.startswith(self._start):
            self._held, self._place = "", _Place.REASONING
            return self.push(body[len(self._start) :])
        if self._start.startswith(body):
            return []
        text, self._held, self._place = self._held, "", _Place.CONTENT
        return [ContentDelta(text)]

    def _push_reasoning(self, text: str) -> list[Event]:
        safe, tag, rest = self._end.push(text)
        body = self._held + safe
        if not self._begun:
            body = body.lstrip()
        kept = body.rstrip()
        self._begun = self._begun or bool(kept)
        self._held = body[len(kept) :] if tag is None else ""
        events: list[Event] = [ReasoningDelta(kept)] if kept else []
        if tag is not None:
            self._place = _Place.AFTER
            events += self.push(rest)
        return events


def prompt_opens_reasoning(prompt: str, start: str = "<think>") -> bool:
    """Whether a rendered prompt ends inside the thinking, as the templates of reasoning models make it."""
    return prompt.rstrip().endswith(start)
