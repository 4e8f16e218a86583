"""What the text of a model turns into while it is generated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the thinking before the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """The model calls a tool. `index` counts the calls of this answer from 0; `id` is the same in every run."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolArgumentsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = ContentDelta | ReasoningDelta | ToolCallStart | ToolArgumentsDelta


def joined(events: list[Event]) -> list[Event]:
    """The same events with neighbouring deltas of one kind made one, and empty ones left out.

    >>> joined([ContentDelta("a"), ContentDelta("b"), ReasoningDelta("")])
    [ContentDelta(text='ab')]
    """
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, ToolCallStart):
            result.append(event)
        elif not event.text:
            continue
        elif isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            result[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            result[-1] = ReasoningDelta(last.text + event.text)
        elif (
            isinstance(event, ToolArgumentsDelta) and isinstance(last, ToolArgumentsDelta) and last.index == event.index
        ):
            result[-1] = ToolArgumentsDelta(event.index, last.text + event.text)
        else:
            result.append(event)
    return result
