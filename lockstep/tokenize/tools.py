"""Tool calls in the text of a model, while it arrives. One parser for each way models write them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection
from typing import final

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.tokenize.automaton import Finder
from lockstep.tokenize.calls import CallLog, CallReader
from lockstep.tokenize.events import ContentDelta, Event, joined
from lockstep.tokenize.json_scan import JsonScanner, Scan
from lockstep.tokenize.pythonic import PythonCallScanner, parse_call
from lockstep.tokenize.reasoning import ReasoningSplitter


class ToolParser(abc.ABC):
    """Text in pieces to content and tool calls.

    However the text is cut into pieces, the joined events are the same. Text that is no proper call is content, all of
    it; if a call breaks off after it was announced, what came of its arguments stays and the rest is content.
    """

    @abc.abstractmethod
    def push(self, text: str) -> list[Event]:
        """The events that this piece makes certain."""

    @abc.abstractmethod
    def finish(self) -> list[Event]:
        """The events of the text still held back."""


@final
class HermesParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>` anywhere in the text (Hermes, Qwen 2.5 and 3)."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, log: CallLog) -> None:
        self._log = log
        self._finder = Finder([self.OPEN])
        self._reader: CallReader | None = None
        self._closing: str | None = None

    def push(self, text: str) -> list[Event]:
        self._feed(text)
        return self._log.take()

    def _feed(self, text: str) -> None:
        while text:
            if self._closing is not None:
                text = self._close(text)
            elif self._reader is not None:
                text = self._read(self._reader, text)
            else:
                safe, tag, text = self._finder.push(text)
                self._log.content(safe)
                if tag is not None:
                    self._reader = CallReader(self._log)

    def _read(self, reader: CallReader, text: str) -> str:
        for place, character in enumerate(text):
            result = reader.step(character)
            if result is Scan.MORE:
                continue
            self._reader = None
            if result is Scan.DONE:
                self._closing = ""
                return text[place + 1 :]
            return self._spill(reader, text[place:])
        return ""

    def _spill(self, reader: CallReader, rest: str) -> str:
        """Give back the text of what is no call; a tag in it may open another."""
        if reader.started:
            return rest
        self._log.content(self.OPEN)
        return reader.raw + rest

    def _close(self, text: str) -> str:
        for place, character in enumerate(text):
            closing = (self._closing or "") + character
            self._closing = closing
            body = closing.lstrip()
            if body == self.CLOSE:
                self._closing = None
                return text[place + 1 :]
            if not self.CLOSE.startswith(body):
                self._closing = None
                return closing + text[place + 1 :]
        return ""

    def finish(self) -> list[Event]:
        if self._reader is not None and not self._reader.started:
            self._log.content(self.OPEN + self._reader.raw)
        self._log.content(self._closing or "")
        self._reader = self._closing = None
        self._log.content(self._finder.flush())
        return self._log.finish()


@final
class LlamaParser(ToolParser):
    """The whole answer is `{"name": ..., "parameters": {...}}`, several with `;` between (Llama 3.1 and later)."""

    TAG = "<|python_tag|>"

    def __init__(self, log: CallLog) -> None:
        self._log = log
        self._state = "start"
        self._held = ""
        self._reader: CallReader | None = None

    def push(self, text: str) -> list[Event]:
        for place, character in enumerate(text):
            if self._state == "content":
                self._log.content(text[place:])
                break
            self._step(character)
        return self._log.take()

    def _step(self, character: str) -> None:
        if self._reader is not None:
            self._read(self._reader, character)
            return
        self._held += character
        body = self._held.lstrip()
        if self._state == "between" and body[:1] in (";", ","):
            body = body[1:].lstrip()
        body = body.removeprefix(self.TAG).lstrip()
        if body == "{":
            self._reader = CallReader(self._log, needs_arguments=True)
            self._reader.step("{")
        elif body and not self.TAG.startswith(body):
            self._spill(self._held)

    def _read(self, reader: CallReader, character: str) -> None:
        result = reader.step(character)
        if result is Scan.DONE:
            self._reader, self._held, self._state = None, "", "between"
        elif result is Scan.BAD:
            self._spill(character if reader.started else self._held[:-1] + reader.raw + character)

    def _spill(self, text: str) -> None:
        self._reader, self._held, self._state = None, "", "content"
        self._log.content(text)

    def finish(self) -> list[Event]:
        if self._reader is not None and not self._reader.started:
            self._spill(self._held[:-1] + self._reader.raw)
        elif self._reader is None:
            self._spill(self._held)
        return self._log.finish()


@final
class MistralParser(ToolParser):
    """`[TOOL_CALLS]` and then a JSON list of calls, or `name[ARGS]{...}` for each (Mistral, old and new)."""

    OPEN, ARGS = "[TOOL_CALLS]", "[ARGS]"

    def __init__(self, log: CallLog) -> None:
        self._log = log
        self._finder = Finder([self.OPEN])
        self._state = "content"  # then head, item, between; or head, arguments
        self._held = ""
        self._reader: CallReader | None = None
        self._scanner = JsonScanner()

    def push(self, text: str) -> list[Event]:
        while text:
            if self._state == "content":
                safe, tag, text = self._finder.push(text)
                self._log.content(safe)
                if tag is not None:
                    self._state, self._held = "head", tag
            else:
                character, text = text[0], text[1:]
                text = self._step(character) + text
        return self._log.take()

    def _step(self, character: str) -> str:
        """Take a character; returns text that must be read again as content."""
        if self._state == "arguments":
            return self._in_arguments(character)
        if self._state == "item" and self._reader is not None:
            return self._in_item(self._reader, character)
        self._held += character
        return self._in_head(character) if self._state == "head" else self._between(character)

    def _in_head(self, character: str) -> str:
        body = self._held.removeprefix(self.OPEN).strip()
        if body == "[":
            self._item()
        elif character == "{":
            name = body[:-1].removesuffix(self.ARGS).partition("[CALL_ID]")[0].strip()
            if not self._log.knows(name) or not name.replace("-", "_").replace(".", "_").isidentifier():
                return self._spill()
            self._log.start(name)
            self._log.arguments("{")
            self._state, self._held, self._scanner = "arguments", "", JsonScanner()
            self._scanner.step("{")
        elif len(body) > 256 or "\n" in body:
            return self._spill()
        return ""

    def _in_arguments(self, character: str) -> str:
        result = self._scanner.step(character)
        if result is Scan.BAD:
            self._state = "content"
            return character
        self._log.arguments(character)
        if result is Scan.DONE:
            self._state, self._held = "content", ""
        return ""

    def _item(self) -> None:
        self._state, self._reader = "item", CallReader(self._log)

    def _in_item(self, reader: CallReader, character: str) -> str:
        result = reader.step(character)
        if result is Scan.DONE:
            self._state, self._reader, self._held = "between", None, ""
        elif result is Scan.BAD:
            self._reader = None
            if reader.started:
                self._state, self._held = "content", ""
                return character
            self._held += reader.raw + character
            return self._spill()
        return ""

    def _between(self, character: str) -> str:
        body = self._held.strip()
        if body == ",":
            self._item()
        elif body == "]":
            self._state, self._held = "content", ""
        elif body:
            return self._spill()
        return ""

    def _spill(self) -> str:
        """What was held is content; only after its own tag may another tag open a call."""
        held, self._held, self._state = self._held, "", "content"
        tag = self.OPEN if held.startswith(self.OPEN) else ""
        self._log.content(tag)
        return held[len(tag) :]

    def finish(self) -> list[Event]:
        if self._reader is not None:
            self._held = "" if self._reader.started else self._held + self._reader.raw
        self._log.content(self._held)
        self._log.content(self._finder.flush())
        return self._log.finish()


@final
class PythonicParser(ToolParser):
    """The whole answer is a Python list of calls, `[f(a=1), g(b="x")]` (Llama 3.2 and 4). Each call comes whole."""

    def __init__(self, log: CallLog) -> None:
        self._log = log
        self._state = "start"  # then call, between; content at last
        self._held = ""
        self._opening = ""
        self._scanner = PythonCallScanner()

    def push(self, text: str) -> list[Event]:
        for place, character in enumerate(text):
            if self._state == "content":
                self._log.content(text[place:])
                break
            self._held += character
            self._step(character)
        return self._log.take()

    def _step(self, character: str) -> None:
        if self._state == "call":
            self._in_call(character)
            return
        body = self._held.strip()
        if (self._state, body) in (("start", "["), ("between", ",")):
            self._state, self._opening, self._held = "call", self._held, ""
            self._scanner = PythonCallScanner()
        elif self._state == "between" and body == "]":
            self._state, self._held = "content", ""
        elif body:
            self._spill("")

    def _in_call(self, character: str) -> None:
        result = self._scanner.step(character)
        if result is Scan.MORE:
            return
        call = parse_call(self._held) if result is Scan.DONE else None
        if call is None or not self._log.knows(call[0]):
            self._spill(self._opening)
            return
        self._log.start(call[0])
        self._log.arguments(call[1])
        self._state, self._held = "between", ""

    def _spill(self, before: str) -> None:
        self._log.content(before + self._held)
        self._state, self._held = "content", ""

    def finish(self) -> list[Event]:
        self._spill(self._opening if self._state == "call" else "")
        return self._log.finish()


TOOL_PARSERS: dict[str, Callable[[CallLog], ToolParser]] = {
    "hermes": HermesParser,
    "llama3": LlamaParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}


def tool_format_of(chat_template: str) -> str | None:
    """The name in `TOOL_PARSERS` of the way a model writes calls, as its chat template shows it; None if it shows none."""
    for mark, name in (("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"), ("func_name1(params", "pythonic")):
        if mark in chat_template:
            return name
    return "llama3" if "<|python_tag|>" in chat_template or '"parameters":' in chat_template else None


def tool_parser(
    name: str, *, call_id: Callable[[int], str] | None = None, tool_names: Collection[str] | None = None
) -> ToolParser:
    """A parser for one answer.

    Args:
        name: one of `TOOL_PARSERS`.
        call_id: the id of the n-th call; `call_0`, `call_1` ... if not given.
        tool_names: names that may be called; a call of another is content. None allows every name.

    Raises:
        ConfigError: no such way of writing calls.
    """
    if name not in TOOL_PARSERS:
        raise ConfigError(unknown_name("tool call format", name, TOOL_PARSERS))
    return TOOL_PARSERS[name](CallLog(call_id or "call_{}".format, tool_names))


@final
class OutputParser:
    """Reasoning first, then tool calls in what is left; either may be missing.

    The parsers see text, so a control token such as `[TOOL_CALLS]` must have been decoded with `skip_special=False`.
    """

    def __init__(self, reasoning: ReasoningSplitter | None = None, tools: ToolParser | None = None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def push(self, text: str) -> list[Event]:
        """The events that this piece makes certain."""
        first: list[Event] = self._reasoning.push(text) if self._reasoning else [ContentDelta(text)]
        return joined(self._in_content(first))

    def finish(self) -> list[Event]:
        """The events of the text still held back."""
        last = self._in_content(self._reasoning.finish()) if self._reasoning else []
        return joined([*last, *(self._tools.finish() if self._tools else [])])

    def _in_content(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        result: list[Event] = []
        for event in events:
            result += self._tools.push(event.text) if isinstance(event, ContentDelta) else [event]
        return result
