"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from lockstep.core.request import FinishReason
from lockstep.server.conversation import forced_names, prompted, read_choice, read_tools, template_extra
from lockstep.server.dialects.openai_envelope import usage
from lockstep.server.fields import Fields
from lockstep.server.generation import Choice, Job, Piece
from lockstep.server.service import LanguageService
from lockstep.server.stream import Exchange, data_frame
from lockstep.server.tokens import chat_logprob, version_runs
from lockstep.server.wishes import MAX_ALTERNATIVES, guided, response_format, sampling_params
from lockstep.tokenize.events import ContentDelta, Event, ReasoningDelta, ToolArgumentsDelta, ToolCallStart

DONE = b"data: [DONE]\n\n"
ELSEWHERE = {
    "prompt_logprobs": "is not supported here; use completions",
    "chat_template": "the server's operator chooses it (--chat-template); send a finished prompt to completions",
}


class ChatCompletion(Exchange):
    """One request."""

    def __init__(self, service: LanguageService, body: dict[str, Any]) -> None:
        fields = Fields(body)
        adapter = service.check_name(fields.text("model"))
        choice = read_choice(fields)
        self.names = forced_names(choice, {"prompt": "messages"})
        self._tokenizer = service.tokenizer
        self._wants_logprobs = fields.flag("logprobs")
        num_alternatives = fields.integer("top_logprobs", 0, low=0, high=MAX_ALTERNATIVES) or 0
        if num_alternatives and not self._wants_logprobs:
            raise fields.refused("top_logprobs", "needs logprobs: true")
        for name in ("functions", "function_call", "audio"):
            if name in fields:
                raise fields.refused(name, "is not supported; use tools and text")
        if set(fields.texts("modalities")) - {"text"}:
            raise fields.refused("modalities", "this model writes text only")
        for name, reason in ELSEWHERE.items():
            if name in fields:
                raise fields.refused(name, reason)
        messages = [dict(message.values) for message in fields.objects("messages")]
        for message in messages:
            if message.get("role") == "developer":
                message["role"] = "system"
        ready = prompted(
            service,
            fields,
            messages,
            read_tools(fields),
            choice,
            response_format(fields) or guided(fields),
            extra=template_extra(fields),
        )
        options = fields.section("stream_options") or Fields({})
        self.is_stream = fields.flag("stream")
        self._tells_versions = fields.flag("return_weight_versions")
        self._sends_usage = options.flag("include_usage")
        self._continuous = options.flag("continuous_usage_stats")
        limit = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
        self.job = Job(
            id="chatcmpl-" + secrets.token_hex(12),
            prompts=(ready.ids,),
            params=sampling_params(
                fields,
                max_tokens=fields.integer(limit, None, low=1),
                stop=fields.texts("stop"),
                num_logprobs=num_alternatives,
                grammar=ready.grammar,
            ),
            parser=ready.parser,
            one_call=not fields.flag("parallel_tool_calls", True),
            priority=fields.integer("priority", 0) or 0,
            cache_salt=fields.text("cache_salt", "") or "",
            adapter=adapter,
        )
        self._head = {"id": self.job.id, "created": int(time.time()), "model": adapter or service.name}
        self._seen: dict[int, Choice] = {}

    def whole(self, choices: list[Choice]) -> Any:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage(self.job, choices),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content}
        if choice.reasoning:
            message |= {"reasoning_content": choice.reasoning, "reasoning": choice.reasoning}
        if choice.calls:
            message["content"] = choice.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in choice.calls
            ]
        document = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice, 0, len(choice.sample.tokens)),
            "finish_reason": _finish_reason(choice),
        }
        return document | ({"weight_versions": version_runs(choice.sample)} if self._tells_versions else {})

    def piece(self, piece: Piece) -> Iterable[bytes]:
        choice = piece.choice
        if choice.index not in self._seen:
            self._seen[choice.index] = choice
            yield self._chunk(choice, {"role": "assistant", "content": ""}, None, None)
        logprobs = self._logprobs(choice, piece.first, piece.end)
        deltas = [_delta(event) for event in piece.events]
        if not deltas and self._wants_logprobs and piece.end > piece.first:
            deltas = [{"content": ""}]
        for delta in deltas:
            yield self._chunk(choice, delta, None, logprobs)
            logprobs = None
        if piece.is_finished:
            yield self._chunk(choice, {}, _finish_reason(choice), None)

    def end(self) -> Iterable[bytes]:
        if self._sends_usage:
            count = usage(self.job, list(self._seen.values()))
            yield data_frame({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": count})
        yield DONE

    def _chunk(self, choice: Choice, delta: dict[str, Any], reason: str | None, logprobs: Any) -> bytes:
        document: dict[str, Any] = {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": [{"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}],
        }
        if self._sends_usage:
            document["usage"] = usage(self.job, list(self._seen.values())) if self._continuous else None
        return data_frame(document)

    def _logprobs(self, choice: Choice, first: int, end: int) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        sample = choice.sample
        content = [
            chat_logprob(
                self._tokenizer,
                sample.tokens[place],
                sample.logprobs[place],
                sample.alternatives[place] if sample.alternatives else None,
            )
            for place in range(first, end)
        ]
        return {"content": content, "refusal": None}


def _delta(event: Event) -> dict[str, Any]:
    if isinstance(event, ContentDelta):
        return {"content": event.text}
    if isinstance(event, ReasoningDelta):
        return {"reasoning_content": event.text, "reasoning": event.text}
    if isinstance(event, ToolCallStart):
        function = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
    assert isinstance(event, ToolArgumentsDelta)
    return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}


def _finish_reason(choice: Choice) -> str:
    if choice.sample.finish_reason is FinishReason.LENGTH:
        return "length"
    return "tool_calls" if choice.calls else "stop"
