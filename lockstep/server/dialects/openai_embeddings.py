"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from typing import Any

from lockstep.server.fields import Fields
from lockstep.server.service import LanguageService
from lockstep.server.tokens import read_prompts


async def embeddings(service: LanguageService, body: dict[str, Any]) -> Any:
    """The reply's document."""
    fields = Fields(body)
    if service.check_name(fields.text("model")):
        raise fields.refused("model", f"embeddings are made by {service.name!r} itself, without an adapter")
    form = fields.one_of("encoding_format", ("float", "base64"), "float")
    if "dimensions" in fields:
        raise fields.refused("dimensions", "this model's vectors have one length; leave it out")
    prompts = [service.encode(item) if isinstance(item, str) else item for item in read_prompts(fields, "input")]
    vectors = await service.embed(prompts)
    num = sum(map(len, prompts))
    data = [
        {"object": "embedding", "index": index, "embedding": vector if form == "float" else _base64(vector)}
        for index, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": service.name,
        "usage": {"prompt_tokens": num, "total_tokens": num},
    }


def _base64(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's client asks for unless told otherwise."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
