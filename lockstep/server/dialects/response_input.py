"""`input` of /v1/responses to messages in OpenAI's chat form."""

from __future__ import annotations

from typing import Any

from lockstep.server.conversation import refuse_other_media
from lockstep.server.fields import Fields

TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
KINDS = ("message", "function_call", "function_call_output", "reasoning")


def read_input(fields: Fields) -> list[dict[str, Any]]:
    """The conversation: instructions first, then the input, a text or a list of items."""
    messages: list[dict[str, Any]] = []
    instructions = fields.text("instructions")
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(fields.values.get("input"), str):
        return [*messages, {"role": "user", "content": fields.values["input"]}]
    if not fields.values.get("input") or not isinstance(fields.values["input"], list):
        raise fields.wrong("input", "a string or an array of items")
    for item in fields.objects("input"):
        _add(messages, item)
    return messages


def _add(messages: list[dict[str, Any]], item: Fields) -> None:
    kind = item.one_of("type", KINDS, "message")
    if kind == "message":
        role = item.one_of("role", ("user", "assistant", "system", "developer"))
        if role is None:
            raise item.wrong("role", "'user', 'assistant', 'system' or 'developer'")
        messages.append({"role": "system" if role == "developer" else role, "content": _content(item, "content")})
    elif kind == "function_call":
        function = {"name": item.needed_text("name"), "arguments": item.needed_text("arguments")}
        call = {"id": item.needed_text("call_id"), "type": "function", "function": function}
        # Calls made in one turn are one message.
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        output = _content(item, "output")
        messages.append({"role": "tool", "tool_call_id": item.needed_text("call_id"), "content": output})


def _content(item: Fields, name: str) -> str:
    value = item.values.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        raise item.wrong(name, "a string or an array of parts")
    texts = []
    for part in item.objects(name):
        refuse_other_media(part)
        kind = part.one_of("type", TEXT_PARTS)
        if kind is None:
            raise part.wrong("type", "'input_text' or 'output_text'")
        texts.append(part.needed_text("refusal" if kind == "refusal" else "text"))
    return "\n".join(texts)
