"""Messages and tools, in OpenAI's form, to a job: what the chat dialects share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.core.sampling import GrammarKind, GrammarSpec
from lockstep.server.fields import Fields
from lockstep.server.service import LanguageService
from lockstep.tokenize.tools import OutputParser


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """What the client wants of calls: `mode` is auto, none, required; a `name` is that function and no other."""

    mode: str = "auto"
    name: str = ""

    @property
    def is_forced(self) -> bool:
        return self.mode == "required" or bool(self.name)


@dataclass(frozen=True)
class Prompted:
    """A conversation, ready to go on."""

    ids: tuple[int, ...]
    parser: Callable[[], OutputParser] | None
    grammar: GrammarSpec | None


def prompted(
    service: LanguageService,
    fields: Fields,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    choice: ToolChoice,
    grammar: GrammarSpec | None,
    *,
    extra: Mapping[str, Any] | None = None,
    continues: bool = False,
) -> Prompted:
    """The prompt of messages in OpenAI's form, with the constraint of a forced call.

    Args:
        continues: the answer goes on with the last message, whatever the body says.

    Raises:
        Refusal, InputError: messages, tools or choice that cannot be met.
    """
    offered = [] if choice.mode == "none" else list(tools)
    names = [tool["function"]["name"] for tool in offered]
    if choice.is_forced:
        if not offered:
            raise fields.refused("tool_choice", "a call is wanted and there are no tools")
        if choice.name and choice.name not in names:
            raise fields.refused("tool_choice", f"there is no tool {choice.name[:80]!r} among {names}")
        if grammar is not None:
            raise fields.refused("tool_choice", "a forced call and a response format exclude each other")
        wanted = [tool for tool in offered if choice.name in ("", tool["function"]["name"])]
        grammar = _call_grammar(wanted)
    prompt = service.chat_text(
        messages,
        offered,
        extra=extra,
        add_generation_prompt=fields.flag("add_generation_prompt", True) and not continues,
        continue_final_message=fields.flag("continue_final_message") or continues,
    )
    constrained = grammar is not None
    parser = service.parser(prompt, names, forced_call=choice.is_forced, constrained=constrained)
    return Prompted(service.encode(prompt, add_special=False), parser, grammar)


def read_tools(fields: Fields, *, flat: bool = False) -> list[dict[str, Any]]:
    """The functions offered, in OpenAI's chat form; `flat`: Responses writes them without the inner object."""
    tools = []
    for tool in fields.objects("tools"):
        tool.one_of("type", ("function",), "function")
        function = tool if flat else tool.section("function")
        if function is None:
            raise tool.wrong("function", "an object")
        parameters = function.section("parameters")
        described: dict[str, Any] = {"name": function.needed_text("name")}
        if not described["name"]:
            raise function.wrong("name", "a name")
        described["description"] = function.text("description", "")
        described["parameters"] = {"type": "object", "properties": {}} if parameters is None else parameters.values
        tools.append({"type": "function", "function": described})
    return tools


def read_choice(fields: Fields, *, flat: bool = False) -> ToolChoice:
    """`tool_choice` of OpenAI's protocols."""
    value = fields.values.get("tool_choice")
    if value is None:
        return ToolChoice()
    if isinstance(value, str):
        return ToolChoice(mode=fields.one_of("tool_choice", ("auto", "none", "required")) or "auto")
    section = fields.section("tool_choice")
    assert section is not None
    section.one_of("type", ("function",), "function")
    inner = section if flat else section.section("function")
    if inner is None:
        raise section.wrong("function", "an object with a name")
    return ToolChoice(mode="required", name=inner.needed_text("name"))


def forced_names(choice: ToolChoice, names: dict[str, str]) -> dict[str, str]:
    """A dialect's names of the engine's parts; where a call is forced, the schema at fault is a tool's."""
    return {**names, "json_schema": "tools"} if choice.is_forced else names


def refuse_other_media(part: Fields) -> None:
    """Raises Refusal for a part that is an image, a sound or a file: known words, and nothing that this model reads."""
    if str(part.values.get("type")).removeprefix("input_") in ("image", "image_url", "audio", "file", "document"):
        raise part.refused("type", f"{part.values['type']!r} is not supported; this model reads text only")


def template_extra(fields: Fields) -> dict[str, Any]:
    """Variables for the chat template."""
    section = fields.section("chat_template_kwargs")
    extra = {} if section is None else dict(section.values)
    effort = fields.text("reasoning_effort")
    return extra if effort is None else {"reasoning_effort": effort, **extra}


def _call_grammar(tools: Sequence[Mapping[str, Any]]) -> GrammarSpec:
    """One JSON object that calls one of the tools: what every parser of bare calls reads."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": {"type": "object", **tool["function"]["parameters"]},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return GrammarSpec(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))
