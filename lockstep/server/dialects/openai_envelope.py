"""What OpenAI's routes share: the error envelope and the usage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.core.errors import InputError
from lockstep.server.generation import Choice, Job
from lockstep.server.replies import Refusal, Reply, error_headers, json_reply, shortened
from lockstep.server.wishes import CLIENT_NAMES

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded", 503: "service_unavailable"}
MAX_MESSAGE = 1000


def openai_error(error: Refusal | InputError) -> Reply:
    """`{"error": {"message", "type", "param", "code"}}`."""
    status = error.status if isinstance(error, Refusal) else 400
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = CODES.get(status) if status != 404 or error.field == "model" else None
    field = CLIENT_NAMES.get(error.field, error.field)
    document = {"message": shortened(str(error), MAX_MESSAGE), "type": kind, "param": field or None, "code": code}
    return json_reply({"error": document}, status)._replace(headers=error_headers(error))


def openai_error_frame(reply: Reply) -> bytes:
    """The same within a stream, which it ends."""
    return b"data: " + reply.body + b"\n\ndata: [DONE]\n\n"


def usage(job: Job, choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of all prompts, once each, and of all samples."""
    num_prompt = sum(map(len, job.prompts))
    num_generated = sum(len(choice.sample.tokens) for choice in choices)
    num_cached = sum(choice.sample.num_cached for choice in choices if choice.sample.index == 0)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
