"""POST /score and /rerank, with the bodies of vLLM's routes for a model that embeds: the score of two texts is the cosine of
their vectors."""

from __future__ import annotations

import secrets
import time
from typing import Any

from lockstep.server.fields import Fields
from lockstep.server.service import LanguageService
from lockstep.server.tokens import MAX_PROMPTS


async def score(service: LanguageService, body: dict[str, Any]) -> Any:
    """One text against several, or several against as many."""
    fields = Fields(body)
    service.check_name(fields.text("model"))
    first, second = _texts(fields, "text_1"), _texts(fields, "text_2")
    if len(first) not in (1, len(second)):
        raise fields.refused("text_1", f"{len(first)} texts for {len(second)}; expected one, or as many")
    left, num_left = await _vectors(service, first)
    right, num_right = await _vectors(service, second)
    left = left * len(right) if len(left) == 1 else left
    data = [
        {"index": index, "object": "score", "score": _cosine(one, other)}
        for index, (one, other) in enumerate(zip(left, right, strict=True))
    ]
    head = {"id": "score-" + secrets.token_hex(12), "object": "list", "created": int(time.time())}
    num = num_left + num_right
    return {**head, "model": service.name, "data": data, "usage": {"prompt_tokens": num, "total_tokens": num}}


async def rerank(service: LanguageService, body: dict[str, Any]) -> Any:
    """Documents by their nearness to a query, the nearest first; equal ones in the order given."""
    fields = Fields(body)
    service.check_name(fields.text("model"))
    documents = _texts(fields, "documents")
    top_n = fields.integer("top_n", 0, low=0) or len(documents)
    (query,), num_query = await _vectors(service, [fields.needed_text("query")])
    vectors, num_documents = await _vectors(service, documents)
    scores = [_cosine(query, vector) for vector in vectors]
    order = sorted(range(len(documents)), key=lambda index: -scores[index])[:top_n]
    return {
        "id": "rerank-" + secrets.token_hex(12),
        "model": service.name,
        "usage": {"prompt_tokens": num_query + num_documents, "total_tokens": num_query + num_documents},
        "results": [
            {"index": index, "document": {"text": documents[index]}, "relevance_score": scores[index]}
            for index in order
        ],
    }


def _texts(fields: Fields, name: str) -> list[str]:
    value = fields.values.get(name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise fields.wrong(name, "a string or an array of strings, none missing")
    if len(value) > MAX_PROMPTS:
        raise fields.refused(name, f"{len(value)} texts; at most {MAX_PROMPTS} in a request")
    return value


async def _vectors(service: LanguageService, texts: list[str]) -> tuple[list[list[float]], int]:
    """(vectors of length 1, number of tokens)."""
    prompts = [service.encode(text) for text in texts]
    return await service.embed(prompts), sum(map(len, prompts))


def _cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
