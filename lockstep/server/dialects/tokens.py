"""POST /tokenize and /detokenize, as vLLM's and llama.cpp's servers have them: the body's keys tell which is meant."""

from __future__ import annotations

from typing import Any

from lockstep.server.conversation import read_tools, template_extra
from lockstep.server.fields import Fields
from lockstep.server.service import LanguageService
from lockstep.server.tokens import token_text


async def tokenize(service: LanguageService, body: dict[str, Any]) -> Any:
    """vLLM: `prompt` or `messages` -> count, max_model_len, tokens. llama.cpp: `content` -> tokens."""
    fields = Fields(body)
    service.check_name(fields.text("model"))
    if "content" in fields:
        special = fields.flag("add_special")
        plain = fields.flag("parse_special", True)
        ids = service.tokenizer.encode(fields.needed_text("content"), add_special=special, parse_special=plain)
        if fields.flag("with_pieces"):
            return {"tokens": [{"id": token, "piece": token_text(service.tokenizer, token)} for token in ids]}
        return {"tokens": ids}
    if "messages" in fields:
        messages = [dict(message.values) for message in fields.objects("messages")]
        generation = fields.flag("add_generation_prompt", True)
        text = service.chat_text(
            messages, read_tools(fields), extra=template_extra(fields), add_generation_prompt=generation
        )
        found = service.encode(text, add_special=fields.flag("add_special_tokens"))
    else:
        found = service.encode(fields.needed_text("prompt"), add_special=fields.flag("add_special_tokens", True))
    reply: dict[str, Any] = {
        "count": len(found),
        "max_model_len": service.engine.plan.max_context,
        "tokens": list(found),
        "token_strs": None,
    }
    if fields.flag("return_token_strs"):
        reply["token_strs"] = [token_text(service.tokenizer, token) for token in found]
    return reply


async def detokenize(service: LanguageService, body: dict[str, Any]) -> Any:
    """`tokens` -> the text, under both servers' names."""
    fields = Fields(body)
    service.check_name(fields.text("model"))
    if "tokens" not in fields:
        raise fields.wrong("tokens", "an array of token ids")
    ids, num = fields.ids("tokens"), await service.engine.call(lambda engine: engine.model.vocab_size)
    if max(ids, default=0) >= num:
        raise fields.refused("tokens", f"{max(ids)} is no token; expected 0 <= id < {num}")
    text = service.tokenizer.decode(ids, skip_special=False)
    return {"prompt": text, "content": text}
