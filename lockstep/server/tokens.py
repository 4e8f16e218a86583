"""How replies name single tokens and prompts of several kinds."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from lockstep.core.request import Alternative, Sample
from lockstep.server.fields import Fields, is_id
from lockstep.tokenize.tokenizer import Tokenizer

MAX_PROMPTS = 2048


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; of one that is no whole text its bytes, so that no two differ in bytes and look alike."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprob(
    tokenizer: Tokenizer, token: int, logprob: float, alternatives: tuple[Alternative, ...] | None
) -> dict[str, Any]:
    """OpenAI's object for a token of a chat."""

    def entry(index: int, value: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(index)
        return {"token": token_text(tokenizer, index), "logprob": finite(value), "bytes": list(data)}

    others = [entry(other.token, other.logprob) for other in alternatives or ()]
    return entry(token, logprob) | {"top_logprobs": others}


def version_runs(sample: Sample) -> list[dict[str, Any]]:
    """Which weights made which tokens: one entry for each run of neighbours, `num_tokens` long."""
    return [
        {"version": weights.version, "digest": weights.digest, "num_tokens": len(list(run))}
        for weights, run in groupby(sample.versions)
    ]


def finite(value: float) -> float:
    """JSON has no infinity; protocols write -9999 for a token that cannot be."""
    return max(value, -9999.0)


def read_prompts(fields: Fields, name: str) -> list[str | tuple[int, ...]]:
    """A text, texts, token ids, or lists of token ids.

    Raises:
        Refusal: anything else, or nothing.
    """
    value = fields.values.get(name)
    if isinstance(value, str):
        return [value]
    expected = "a string, an array of strings, of token ids, or of arrays of token ids, none empty"
    if not isinstance(value, list) or not value:
        raise fields.wrong(name, expected)
    if all(is_id(item) for item in value):
        return [tuple(value)]
    if len(value) > MAX_PROMPTS:
        raise fields.refused(name, f"{len(value)} prompts; at most {MAX_PROMPTS} in a request")
    for item in value:
        good = isinstance(item, str) or (isinstance(item, list) and item and all(is_id(token) for token in item))
        if not good:
            raise fields.wrong(name, expected)
    return [item if isinstance(item, str) else tuple(item) for item in value]
