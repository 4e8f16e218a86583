"""One tool call as a JSON object, read a character at a time: `{"name": "f", "arguments": {...}}`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from lockstep.tokenize.events import ContentDelta, Event, ToolArgumentsDelta, ToolCallStart
from lockstep.tokenize.json_scan import JsonScanner, Scan

_ARGUMENTS = ("arguments", "parameters")


class CallLog:
    """Content and calls in order, as events; gathers what one push makes.

    Blank space beside a call belongs to the call's tags and is left out; all other text is kept.
    """

    def __init__(self, call_id: Callable[[int], str], tool_names: Collection[str] | None) -> None:
        self._call_id = call_id
        self._tool_names = tool_names
        self._events: list[Event] = []
        self._blank = ""
        self.num_calls = 0

    def content(self, text: str) -> None:
        """More of the answer; blank space at its end waits for what follows."""
        body = self._blank + text
        kept = body.rstrip()
        self._blank = body[len(kept) :]
        if kept:
            self._events.append(ContentDelta(kept))

    def knows(self, name: str) -> bool:
        """Whether a tool of this name may be called."""
        return bool(name) and (self._tool_names is None or name in self._tool_names)

    def start(self, name: str) -> None:
        """A call begins."""
        self._blank = ""
        self._events.append(ToolCallStart(self.num_calls, self._call_id(self.num_calls), name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the arguments of the last call."""
        if text:
            self._events.append(ToolArgumentsDelta(self.num_calls - 1, text))

    def take(self) -> list[Event]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """The last events; blank space at the very end is kept unless calls were made."""
        if self._blank and not self.num_calls:
            self._events.append(ContentDelta(self._blank))
        self._blank = ""
        return self.take()


class CallReader:
    """Reads one call object into a `CallLog`.

    The call starts as soon as its name and the first character of its arguments are known, and its arguments are
    handed on as they come, as the model wrote them. Before that, nothing is lost if the text turns out to be something
    else: `raw` holds all of it.

    Args:
        log: takes the events.
        needs_arguments: an object without arguments is no call.
    """

    def __init__(self, log: CallLog, *, needs_arguments: bool = False) -> None:
        self._log = log
        self._needs_arguments = needs_arguments
        self._scanner = JsonScanner()
        self._key: str | None = None
        self._value: str | None = None
        self._name: str | None = None
        self._arguments: str | None = None
        self.raw = ""
        self.started = False

    def step(self, character: str) -> Scan:
        """Take one character: MORE, DONE at the closing brace, or BAD, after which the character is not taken."""
        was, depth = self._scanner.want, self._scanner.depth
        if depth == 0 and character not in " \t\r\n{":
            return Scan.BAD
        result = self._scanner.step(character)
        if result is Scan.BAD:
            return result
        self.raw += character
        if depth == 1:
            self._top(character, was)
        elif depth > 1:
            self._inside(character)
        if self._value is not None and self._whole():
            if not self._value_done():
                return self._refuse()
            self._value = None
        if result is Scan.DONE and not self.started and not self._end():
            return self._refuse()
        return result

    def _refuse(self) -> Scan:
        self.raw = self.raw[:-1]
        return Scan.BAD

    def _top(self, character: str, was: str) -> None:
        now = self._scanner.want
        if was in ("key", "key or end") and now == "key string":
            self._key = ""
        elif was == "key string" and now == "key string":
            self._key = (self._key or "") + character
        elif was == "colon" and now == "value":
            self._value = ""
        elif was == "number" and now != "number":
            pass  # what ends a number is not part of it
        elif self._value or character not in " \t\r\n":
            self._inside(character)

    def _inside(self, character: str) -> None:
        if self._value is None:
            return
        self._value += character
        if self._key in _ARGUMENTS and self._value[0] == "{" and self._name is not None and self._arguments is None:
            if not self.started:
                self._start()
            self._log.arguments(character)

    def _whole(self) -> bool:
        scanner = self._scanner
        return bool(self._value) and scanner.depth <= 1 and (scanner.want in ("comma", "key") or scanner.depth == 0)

    def _start(self) -> None:
        self.started = True
        self._log.start(self._name or "")

    def _value_done(self) -> bool:
        """Keep a value that has been read; False if it cannot belong to a call."""
        value = self._value or ""
        if self._key == "name" and self._name is None:
            name = json.loads(value)
            if not isinstance(name, str) or not self._log.knows(name):
                return False
            self._name = name
            if self._arguments is not None:
                self._start()
                self._log.arguments(self._arguments)
        elif self._key in _ARGUMENTS and self._arguments is None:
            if self.started:
                self._arguments = value
                return True
            text = _argument_text(value)
            if text is None:
                return False
            self._arguments = text
            if self._name is not None:
                self._start()
                self._log.arguments(text)
        return True

    def _end(self) -> bool:
        if self._name is None or self._needs_arguments:
            return False
        self._start()
        self._log.arguments("{}")
        return True


def _argument_text(value: str) -> str | None:
    """Arguments that are no object as they stand: none at all, or an object written as a JSON string."""
    if value == "null":
        return "{}"
    if value.startswith("{"):
        return value
    if not value.startswith('"'):
        return None
    try:
        inner = json.loads(value)
        return inner if isinstance(json.loads(inner), dict) else None
    except (ValueError, RecursionError):
        return None
