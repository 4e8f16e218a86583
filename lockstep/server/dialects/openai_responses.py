"""POST /v1/responses: text and function calls, without server-side storage."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from lockstep.core.request import FinishReason
from lockstep.server.conversation import forced_names, prompted, read_choice, read_tools
from lockstep.server.dialects.response_input import read_input
from lockstep.server.fields import Fields
from lockstep.server.generation import Choice, Job, Piece
from lockstep.server.replies import Reply
from lockstep.server.service import LanguageService
from lockstep.server.stream import Exchange, data_frame
from lockstep.server.wishes import guided, response_format, sampling_params
from lockstep.tokenize.events import ContentDelta, Event, ReasoningDelta, ToolArgumentsDelta, ToolCallStart

UNSUPPORTED = {
    "previous_response_id": "responses are not stored; send the whole conversation as input",
    "conversation": "conversations are not stored; send the whole conversation as input",
    "background": "is not supported; use streaming",
    "prompt": "stored prompts are not supported; send instructions and input",
    "top_logprobs": "is not supported here; use chat completions",
}


class ResponseExchange(Exchange):
    """One request."""

    def __init__(self, service: LanguageService, body: dict[str, Any]) -> None:
        fields = Fields(body)
        adapter = service.check_name(fields.text("model"))
        for name, reason in UNSUPPORTED.items():
            if fields.values.get(name) not in (None, False, 0):
                raise fields.refused(name, reason)
        fields.one_of("truncation", ("auto", "disabled"))
        if "message.output_text.logprobs" in fields.listing("include"):
            raise fields.refused("include", "log-probabilities are not supported here; use chat completions")
        choice, tools = read_choice(fields, flat=True), read_tools(fields, flat=True)
        self.names = forced_names(
            choice, {"prompt": "input", "max_tokens": "max_output_tokens", "json_schema": "text.format"}
        )
        form = fields.section("text")
        effort = fields.section("reasoning")
        ready = prompted(
            service,
            fields,
            read_input(fields),
            tools,
            choice,
            (response_format(form, "format") if form is not None else None) or guided(fields),
            extra={} if effort is None or "effort" not in effort else {"reasoning_effort": effort.text("effort")},
        )
        self.is_stream = fields.flag("stream")
        limit = fields.integer("max_output_tokens", None, low=1)
        self.job = Job(
            id="resp_" + secrets.token_hex(12),
            prompts=(ready.ids,),
            params=sampling_params(
                Fields({**body, "n": 1, "best_of": 1}),
                max_tokens=limit,
                stop=fields.texts("stop"),
                grammar=ready.grammar,
            ),
            parser=ready.parser,
            one_call=not fields.flag("parallel_tool_calls", True),
            adapter=adapter,
        )
        params = self.job.params
        self._echoed = {
            "created_at": int(time.time()),
            "model": adapter or service.name,
            "instructions": fields.text("instructions"),
            "max_output_tokens": limit,
            "metadata": (fields.section("metadata") or Fields({})).values,
            "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "tool_choice": {"type": "function", "name": choice.name} if choice.name else choice.mode,
            "tools": [{"type": "function", "strict": None, **tool["function"]} for tool in tools],
            "text": {"format": {"type": "text"}} if form is None else form.values,
            "truncation": "disabled",
            "previous_response_id": None,
            "store": False,
        }
        self._sequence = 0
        self._choice: Choice | None = None
        self._items: list[dict[str, Any]] = []
        """Items of the stream; the last one is open until another comes."""

    def whole(self, choices: list[Choice]) -> Any:
        choice = choices[0]
        items: list[dict[str, Any]] = []
        if choice.reasoning:
            items.append(self._new("reasoning", text=choice.reasoning))
        if choice.content or not (choice.calls or choice.reasoning):
            items.append(self._new("message", text=choice.content))
        items += [self._new("function_call", call.id, call.name, call.arguments) for call in choice.calls]
        return self._response(choice, _closed(items, _end_of(choice)))

    def piece(self, piece: Piece) -> Iterable[bytes]:
        if self._choice is None:
            self._choice = piece.choice
            yield self._frame("response.created", response=self._response(None, []))
            yield self._frame("response.in_progress", response=self._response(None, []))
        for event in piece.events:
            yield from self._event(event)

    def end(self) -> Iterable[bytes]:
        choice = self._choice
        assert choice is not None
        if not self._items:
            yield from self._open(self._new("message"))
        yield from self._close(_end_of(choice))
        document = self._response(choice, _closed(self._items, _end_of(choice)))
        yield self._frame(f"response.{document['status']}", response=document)

    def _event(self, event: Event) -> Iterable[bytes]:
        last = self._items[-1]["type"] if self._items else ""
        if isinstance(event, ToolCallStart):
            yield from self._open(self._new("function_call", event.id, event.name))
            return
        if isinstance(event, ContentDelta) and last != "message":
            yield from self._open(self._new("message"))
        if isinstance(event, ReasoningDelta) and last != "reasoning":
            yield from self._open(self._new("reasoning"))
        item = self._items[-1]
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        if isinstance(event, ToolArgumentsDelta):
            item["arguments"] += event.text
            yield self._frame("response.function_call_arguments.delta", **place, delta=event.text)
            return
        item["content"][0]["text"] += event.text
        if isinstance(event, ContentDelta):
            yield self._frame("response.output_text.delta", **place, content_index=0, delta=event.text, logprobs=[])
        else:
            yield self._frame("response.reasoning_text.delta", **place, content_index=0, delta=event.text)

    def _open(self, item: dict[str, Any]) -> Iterable[bytes]:
        yield from self._close()
        self._items.append(item)
        index = len(self._items) - 1
        bare = {**item, "content": []} if "content" in item else dict(item)
        yield self._frame("response.output_item.added", output_index=index, item=bare)
        if "content" in item:
            part = dict(item["content"][0])
            yield self._frame(
                "response.content_part.added", item_id=item["id"], output_index=index, content_index=0, part=part
            )

    def _close(self, status: str = "completed") -> Iterable[bytes]:
        if not self._items:
            return
        item = _closed(self._items, status)[-1]
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        if item["type"] == "function_call":
            yield self._frame(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
            )
        else:
            part = item["content"][0]
            if item["type"] == "message":
                yield self._frame("response.output_text.done", **place, content_index=0, text=part["text"], logprobs=[])
            else:
                yield self._frame("response.reasoning_text.done", **place, content_index=0, text=part["text"])
            yield self._frame("response.content_part.done", **place, content_index=0, part=part)
        yield self._frame("response.output_item.done", output_index=place["output_index"], item=item)

    def _new(
        self, kind: str, call_id: str = "", name: str = "", arguments: str = "", *, text: str = ""
    ) -> dict[str, Any]:
        token = secrets.token_hex(12)
        if kind == "function_call":
            head = {"id": f"fc_{token}", "type": kind, "status": "in_progress"}
            return {**head, "call_id": call_id, "name": name, "arguments": arguments}
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": text}
            return {"id": f"rs_{token}", "type": kind, "status": "in_progress", "summary": [], "content": [part]}
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"id": f"msg_{token}", "type": kind, "status": "in_progress", "role": "assistant", "content": [part]}

    def _response(self, choice: Choice | None, items: list[dict[str, Any]]) -> dict[str, Any]:
        status = "in_progress" if choice is None else _end_of(choice)
        cut = status == "incomplete"
        return {
            "id": self.job.id,
            "object": "response",
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items,
            "usage": None if choice is None else _usage(choice),
            **self._echoed,
        }

    def _frame(self, kind: str, **content: Any) -> bytes:
        self._sequence += 1
        return data_frame({"type": kind, "sequence_number": self._sequence - 1, **content}, event=kind)


def responses_error_frame(reply: Reply) -> bytes:
    """An error within a stream, which it ends."""
    return b"event: error\ndata: " + reply.body + b"\n\n"


def _end_of(choice: Choice) -> str:
    return "incomplete" if choice.sample.finish_reason is FinishReason.LENGTH else "completed"


def _closed(items: list[dict[str, Any]], status: str) -> list[dict[str, Any]]:
    """The items as they end: all but the last one, whose status this is, are complete."""
    return [*({**item, "status": "completed"} for item in items[:-1]), {**items[-1], "status": status}]


def _usage(choice: Choice) -> dict[str, Any]:
    sample = choice.sample
    return {
        "input_tokens": len(sample.prompt),
        "input_tokens_details": {"cached_tokens": sample.num_cached, "cache_write_tokens": 0},
        "output_tokens": len(sample.tokens),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(sample.prompt) + len(sample.tokens),
    }
