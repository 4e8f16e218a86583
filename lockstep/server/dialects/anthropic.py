"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import Any

from lockstep.core.errors import InputError
from lockstep.core.request import FinishReason
from lockstep.server.conversation import Prompted, ToolChoice, prompted, refuse_other_media, template_extra
from lockstep.server.fields import Fields
from lockstep.server.generation import Choice, Job, Piece
from lockstep.server.replies import Refusal, Reply, error_headers, json_reply, shortened
from lockstep.server.service import LanguageService
from lockstep.server.stream import Exchange, data_frame
from lockstep.server.wishes import guided, response_format, sampling_params
from lockstep.tokenize.events import ContentDelta, Event, ReasoningDelta, ToolArgumentsDelta, ToolCallStart

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
THINKING = ("enabled", "adaptive", "disabled")


class Messages(Exchange):
    """One request."""

    def __init__(self, service: LanguageService, body: dict[str, Any]) -> None:
        fields = Fields(body)
        adapter = service.check_name(fields.text("model"))
        max_tokens = fields.integer("max_tokens", None, low=1)
        if max_tokens is None:
            raise fields.wrong("max_tokens", "an integer")
        ready = _prompt(service, fields)
        self.is_stream = fields.flag("stream")
        fields.number("temperature", 1.0, low=0.0, high=1.0)
        self.job = Job(
            id="msg_" + secrets.token_hex(12),
            prompts=(ready.ids,),
            params=sampling_params(
                Fields({**body, "n": 1, "best_of": 1}),
                max_tokens=max_tokens,
                stop=fields.texts("stop_sequences"),
                grammar=ready.grammar,
            ),
            parser=ready.parser,
            one_call=(fields.section("tool_choice") or Fields({})).flag("disable_parallel_tool_use"),
            adapter=adapter,
        )
        self._model = adapter or service.name
        self._choice: Choice | None = None
        self._block = -1
        self._open: tuple[str, int] | None = None
        """Kind of the open block, and which call it is."""

    def whole(self, choices: list[Choice]) -> Any:
        choice = choices[0]
        content: list[dict[str, Any]] = []
        if choice.reasoning:
            content.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
        if choice.content or not (choice.calls or choice.reasoning):
            content.append({"type": "text", "text": choice.content})
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": _object(call.arguments)}
            for call in choice.calls
        ]
        reason, stop = _stop(choice)
        return self._message(choice, content, reason, stop, len(choice.sample.tokens))

    def piece(self, piece: Piece) -> Iterable[bytes]:
        if self._choice is None:
            self._choice = piece.choice
            yield _frame("message_start", message=self._message(piece.choice, [], None, None, 0))
        for event in piece.events:
            yield from self._event(event)

    def end(self) -> Iterable[bytes]:
        assert self._choice is not None
        if self._block < 0:
            yield from self._start("text", 0, {"type": "text", "text": ""})
        yield from self._stop_block()
        reason, stop = _stop(self._choice)
        count = {"output_tokens": len(self._choice.sample.tokens)}
        yield _frame("message_delta", delta={"stop_reason": reason, "stop_sequence": stop}, usage=count)
        yield _frame("message_stop")

    def _event(self, event: Event) -> Iterable[bytes]:
        if isinstance(event, ContentDelta):
            yield from self._start("text", 0, {"type": "text", "text": ""})
            delta = {"type": "text_delta", "text": event.text}
        elif isinstance(event, ReasoningDelta):
            yield from self._start("thinking", 0, {"type": "thinking", "thinking": "", "signature": ""})
            delta = {"type": "thinking_delta", "thinking": event.text}
        elif isinstance(event, ToolCallStart):
            block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
            yield from self._start("tool_use", event.index, block)
            return
        else:
            assert isinstance(event, ToolArgumentsDelta)
            delta = {"type": "input_json_delta", "partial_json": event.text}
        yield _frame("content_block_delta", index=self._block, delta=delta)

    def _start(self, kind: str, number: int, block: dict[str, Any]) -> Iterable[bytes]:
        if self._open == (kind, number):
            return
        yield from self._stop_block()
        self._open = (kind, number)
        self._block += 1
        yield _frame("content_block_start", index=self._block, content_block=block)

    def _stop_block(self) -> Iterable[bytes]:
        if self._open is not None:
            self._open = None
            yield _frame("content_block_stop", index=self._block)

    def _message(
        self, choice: Choice, content: list[dict[str, Any]], reason: str | None, stop: str | None, num_generated: int
    ) -> dict[str, Any]:
        cached = choice.sample.num_cached
        return {
            "id": self.job.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": {
                "input_tokens": len(choice.sample.prompt) - cached,
                "cache_read_input_tokens": cached,
                "cache_creation_input_tokens": 0,
                "output_tokens": num_generated,
            },
        }


async def count_tokens(service: LanguageService, body: dict[str, Any]) -> Any:
    """Tokens of the prompt that a request would have."""
    fields = Fields(body)
    service.check_name(fields.text("model"))
    return {"input_tokens": len(_prompt(service, fields).ids)}


def anthropic_error(error: Refusal | InputError) -> Reply:
    """`{"type": "error", "error": {"type", "message"}}`."""
    status = error.status if isinstance(error, Refusal) else 400
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    document = {"type": "error", "error": {"type": kind, "message": shortened(str(error), 1000)}}
    return json_reply(document, status)._replace(headers=error_headers(error))


def anthropic_error_frame(reply: Reply) -> bytes:
    """The same within a stream, which it ends."""
    return b"event: error\ndata: " + reply.body + b"\n\n"


def _prompt(service: LanguageService, fields: Fields) -> Prompted:
    messages: list[dict[str, Any]] = []
    system = _texts(fields, "system")
    if system:
        messages.append({"role": "system", "content": "\n".join(system)})
    for message in fields.objects("messages"):
        messages += _turn(message)
    extra = template_extra(fields)
    thinking = fields.section("thinking")
    if thinking is not None:
        extra = {"enable_thinking": thinking.one_of("type", THINKING) != "disabled", **extra}
    output = fields.section("output_config") or Fields({})
    effort = output.text("effort")
    if effort is not None:
        extra = {"reasoning_effort": effort, **extra}
    grammar = response_format(output, "format") or response_format(fields, "output_format") or guided(fields)
    # The protocol's way to begin the answer: it goes on with a last message of the assistant.
    last = messages[-1] if messages else {}
    begun = last.get("role") == "assistant" and "tool_calls" not in last
    return prompted(service, fields, messages, _tools(fields), _choice(fields), grammar, extra=extra, continues=begun)


def _tools(fields: Fields) -> list[dict[str, Any]]:
    tools = []
    for tool in fields.objects("tools"):
        tool.one_of("type", ("custom",), "custom")
        schema = tool.section("input_schema")
        name = tool.needed_text("name")
        if schema is None or not name:
            raise tool.wrong("input_schema" if name else "name", "a JSON schema" if name else "a name")
        function = {"name": name, "description": tool.text("description", ""), "parameters": schema.values}
        tools.append({"type": "function", "function": function})
    return tools


def _choice(fields: Fields) -> ToolChoice:
    section = fields.section("tool_choice")
    if section is None:
        return ToolChoice()
    kind = section.one_of("type", ("auto", "any", "tool", "none"), "auto")
    if kind == "tool":
        return ToolChoice(mode="required", name=section.needed_text("name"))
    return ToolChoice(mode={"any": "required"}.get(kind or "", kind or "auto"))


def _turn(message: Fields) -> list[dict[str, Any]]:
    """A message in OpenAI's form; results of tools become messages of their own, before the text beside them."""
    role = message.one_of("role", ("user", "assistant", "system"))
    if role is None:
        raise message.wrong("role", "'user' or 'assistant'")
    if isinstance(message.values.get("content"), str):
        return [{"role": role, "content": message.values["content"]}]
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for block in message.objects("content"):
        document = _document(block)
        if document is not None:
            texts.append(document)
            continue
        refuse_other_media(block)
        kind = block.one_of("type", ("text", "tool_use", "tool_result", "thinking", "redacted_thinking"))
        if kind == "text":
            texts.append(block.needed_text("text"))
        elif kind == "tool_use":
            arguments = block.section("input") or Fields({})
            function = {"name": block.needed_text("name"), "arguments": json.dumps(arguments.values)}
            calls.append({"id": block.needed_text("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            content = "\n".join(_texts(block, "content"))
            results.append({"role": "tool", "tool_call_id": block.needed_text("tool_use_id"), "content": content})
        elif kind is None:
            raise block.wrong("type", "'text', 'tool_use' or 'tool_result'")
    own: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if calls:
        own["tool_calls"] = calls
    return [*results, own] if texts or calls or not results else results


def _texts(fields: Fields, name: str) -> list[str]:
    """A string, or blocks of text, documents of text too."""
    value = fields.values.get(name)
    if isinstance(value, str):
        return [value]
    texts = []
    for block in fields.objects(name):
        text = _document(block)
        if text is None:
            refuse_other_media(block)
            if block.one_of("type", ("text",), None) is None:
                raise block.wrong("type", "'text'")
            text = block.needed_text("text")
        texts.append(text)
    return texts


def _document(block: Fields) -> str | None:
    """What a document of text says; None of other blocks."""
    source = block.section("source") if block.values.get("type") == "document" else None
    return source.needed_text("data") if source is not None and source.values.get("type") == "text" else None


def _stop(choice: Choice) -> tuple[str, str | None]:
    sample = choice.sample
    if sample.finish_reason is FinishReason.LENGTH:
        return "max_tokens", None
    if choice.calls:
        return "tool_use", None
    return ("stop_sequence", sample.stop) if isinstance(sample.stop, str) else ("end_turn", None)


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; those that broke off in the middle are handed over as text."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {"partial_json": arguments}
    return value if isinstance(value, dict) else {"value": value}


def _frame(kind: str, **content: Any) -> bytes:
    return data_frame({"type": kind, **content}, event=kind)
