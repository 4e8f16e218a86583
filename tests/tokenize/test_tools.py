from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.core.errors import ConfigError
from lockstep.tokenize.events import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallStart,
    joined,
)
from lockstep.tokenize.json_scan import JsonScanner, Scan
from lockstep.tokenize.reasoning import ReasoningSplitter, prompt_opens_reasoning
from lockstep.tokenize.tools import TOOL_PARSERS, OutputParser, tool_format_of, tool_parser

ARGUMENTS = '{"city": "Zürich \\"龜\\" }", "days": [1, {"a": null}], "x": -1.5e3}'


def run(name: str, text: str, cuts: tuple[int, ...] = (), names: list[str] | None = None) -> list[Event]:
    parser = OutputParser(ReasoningSplitter(), tool_parser(name, tool_names=names))
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    events = [event for start, end in itertools.pairwise(bounds) for event in parser.push(text[start:end])]
    return joined([*events, *parser.finish()])


def call(index: int, name: str, arguments: str) -> list[Event]:
    return [ToolCallStart(index, f"call_{index}", name), ToolArgumentsDelta(index, arguments)]


CASES: list[tuple[str, str, list[Event]]] = [
    (
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "now"}</tool_call> done',
        [ContentDelta("Let me see."), *call(0, "weather", ARGUMENTS), *call(1, "now", "{}"), ContentDelta(" done")],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>\n', call(0, "now", "{}")),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', call(0, "f", '{"a": 1}')),
    ("hermes", '<think>\nhm\n</think>\n\n<tool_call>{"name": "f", "id": 3, "arguments": null}</tool_call>',
     [ReasoningDelta("hm"), *call(0, "f", "{}")]),
    ("llama3", f'{{"name": "weather", "parameters": {ARGUMENTS}}}', call(0, "weather", ARGUMENTS)),
    ("llama3", '<|python_tag|>{"type": "function", "name": "a", "parameters": {}}; {"name": "b", "parameters": {"x": 1}}',
     [*call(0, "a", "{}"), *call(1, "b", '{"x": 1}')]),
    ("mistral", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "b", "arguments": {{}}}}]',
     [*call(0, "weather", ARGUMENTS), *call(1, "b", "{}")]),
    ("mistral", f'ok [TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]b{{}}',
     [ContentDelta("ok"), *call(0, "weather", ARGUMENTS), *call(1, "b", "{}")]),
    ("pythonic", "[weather(city='Zü)r\\'ich', days=[1, {'a': None}]), b()]",
     [*call(0, "weather", '{"city": "Zü)r\'ich", "days": [1, {"a": null}]}'), *call(1, "b", "{}")]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_calls_are_found_however_the_text_is_cut(name: str, text: str, expected: list[Event]) -> None:
    assert run(name, text) == expected
    assert run(name, text, tuple(range(len(text)))) == expected

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, len(text)), max_size=8))
    def check(cuts: list[int]) -> None:
        assert run(name, text, tuple(cuts)) == expected

    check()


NO_CALLS = [
    ("hermes", "a < b, <tool_cal> and <tool_call> not json </tool_call>"),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "argum'),
    ("hermes", '<tool_call>{"nam<tool_call>{"x'),
    ("hermes", "text with blanks  \n"),
    ("hermes", "half a tag <tool_c"),
    ("llama3", '{"name": "Bob", "age": 3}'),
    ("llama3", 'Here: {"name": "f", "parameters": {}}'),
    ("llama3", "  <|python_tag|>print(1)"),
    ("llama3", '{"name": "f", "parameters": 7}'),
    ("llama3", " {"),
    ("mistral", "[TOOL_CALLS] [1, 2]"),
    ("mistral", "[TOOL_CALLS] what is this\nand that"),
    ("mistral", '[TOOL_CALLS] [{"name": "f"'),
    ("mistral", "[TOOL_CALLS]"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[f(1)]"),
    ("pythonic", "[f(a=g())]"),
    ("pythonic", "[f(a='x'"),
    ("pythonic", "[f(a=1]"),
    ("pythonic", "hello [f()]"),
    ("pythonic", "["),
]


@pytest.mark.parametrize(("name", "text"), NO_CALLS)
def test_what_is_no_call_is_content_without_loss(name: str, text: str) -> None:
    assert run(name, text) == run(name, text, tuple(range(len(text)))) == [ContentDelta(text)]


def test_unknown_tools_are_content() -> None:
    text = '{"name": "Bob", "parameters": {}}'
    assert run("llama3", text, names=["weather"]) == [ContentDelta(text)]
    assert run("llama3", text, names=["Bob"]) == call(0, "Bob", "{}")


def test_a_call_that_breaks_off_loses_nothing() -> None:
    for name, before, after in (
        ("hermes", '<tool_call>{"name": "f", "arguments": ', "</tool_call>"),
        ("llama3", '{"name": "f", "parameters": ', ""),
        ("mistral", "[TOOL_CALLS]f[ARGS]", ""),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": ', "}]"),
    ):
        for cut in range(2):
            text = before + '{"a": 1, oops}' + after
            expected = [*call(0, "f", '{"a": 1, '), ContentDelta("oops}" + after)]
            assert run(name, text, tuple(range(len(text))) if cut else ()) == expected
        assert run(name, before + '{"a": [1, "x') == call(0, "f", '{"a": [1, "x')


def test_arguments_stream_as_they_come() -> None:
    parser = tool_parser("hermes", call_id=lambda index: f"id{index}")
    assert parser.push('<tool_call>{"name": "f", "arg') == []
    assert joined(parser.push('uments": {"a')) == [ToolCallStart(0, "id0", "f"), ToolArgumentsDelta(0, '{"a')]
    assert joined(parser.push('": 1')) == [ToolArgumentsDelta(0, '": 1')]


PIECES = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", "<think>", "</think>"),
    *('{"name": "f", ', '"arguments": {"a": 1}}', "f(", "a=1)", "null", "龜", "x", "1"),
    *'[]{},; \n"\\',
]
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(character in rest for character in part)


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_cuts_change_nothing_whatever_the_text(name: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(texts, st.lists(st.integers(0, 80), max_size=5))
    def check(text: str, cuts: list[int]) -> None:
        whole = run(name, text)
        assert run(name, text, tuple(cuts)) == run(name, text, tuple(range(len(text)))) == whole
        content = "".join(event.text for event in whole if isinstance(event, ContentDelta))
        assert is_subsequence(content, text)
        if not any(isinstance(event, ToolCallStart | ReasoningDelta) for event in whole) and "<think>" not in text:
            assert content == text

    check()


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\n a b \n</think>\n\nanswer \n", False, [ReasoningDelta("a b"), ContentDelta("answer \n")]),
        ("  <think></think>x", False, [ContentDelta("x")]),
        ("no <think>x</think>", False, [ContentDelta("no <think>x</think>")]),
        ("deep</thin</think>y", True, [ReasoningDelta("deep</thin"), ContentDelta("y")]),
        ("never closed </th", True, [ReasoningDelta("never closed </th")]),
        (" <thi", False, [ContentDelta(" <thi")]),
        ("a\n\nb</think> ", True, [ReasoningDelta("a\n\nb")]),
    ],
)
def test_reasoning(text: str, inside: bool, expected: list[Event]) -> None:
    for cuts in ([0, len(text)], list(range(len(text) + 1))):
        splitter = ReasoningSplitter(starts_inside=inside)
        events = [event for start, end in itertools.pairwise(cuts) for event in splitter.push(text[start:end])]
        assert joined([*events, *splitter.finish()]) == expected
    assert prompt_opens_reasoning("...assistant\n<think>\n")
    assert not prompt_opens_reasoning("<think>x</think>")


def scan(text: str) -> bool:
    """Whether the scanner takes this as one whole JSON value."""
    scanner = JsonScanner()
    for place, character in enumerate(text):
        result = scanner.step(character)
        if result is Scan.DONE:
            return not text[place + 1 :].strip(" \t\r\n")
        if result is Scan.BEFORE:
            return not text[place:].strip(" \t\r\n")
        if result is Scan.BAD:
            return False
    return scanner.want == "number" and scanner.step(" ") is Scan.BEFORE


def loads(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([*'{}[]:,"\\a01-.e \n', "\\n", "\\u00e9", "E+", "true"]), max_size=9).map("".join),
)
def test_scanner_agrees_with_json(text: str) -> None:
    assert scan(text) == loads(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(json_values, st.booleans(), st.sampled_from([None, 1]), st.data())
def test_scanner_takes_every_json_value_and_no_beginning_of_one(
    value: object, ascii_only: bool, indent: int | None, data: st.DataObject
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert scan(text)
    cut = data.draw(st.integers(0, len(text)))
    assert scan(text[:cut]) == loads(text[:cut])


def test_formats_by_template() -> None:
    assert tool_format_of("...<tool_call>...") == "hermes"
    assert tool_format_of("[TOOL_CALLS]") == "mistral"
    assert tool_format_of("plain") is None
    with pytest.raises(ConfigError, match="did you mean 'hermes'"):
        tool_parser("herms")
