"""Sampling fields as OpenAI's protocol names them, with those that vLLM, SGLang and llama.cpp servers add."""

from __future__ import annotations

import json
from typing import Any

from lockstep.core.sampling import GrammarKind, GrammarSpec, SamplingParams
from lockstep.server.fields import Fields

MAX_N = 128
MAX_ALTERNATIVES = 64
GUIDED = {
    "guided_json": GrammarKind.JSON_SCHEMA,
    "guided_regex": GrammarKind.REGEX,
    "guided_choice": GrammarKind.CHOICE,
    "guided_grammar": GrammarKind.LARK,
}
STRUCTURED = {
    "json": GrammarKind.JSON_SCHEMA,
    "regex": GrammarKind.REGEX,
    "choice": GrammarKind.CHOICE,
    "grammar": GrammarKind.LARK,
}
CLIENT_NAMES = {
    "num_logprobs": "top_logprobs",
    "json_schema": "response_format",
    "json_object": "response_format",
    "regex": "guided_regex",
    "choices": "guided_choice",
    "grammar": "guided_grammar",
    "bad_token_ids": "bad_token_ids",
    "bad_words": "bad_words",
}
"""What the engine calls a part of a request -> what the client called it."""


def sampling_params(
    fields: Fields,
    *,
    max_tokens: int | None,
    stop: tuple[str, ...],
    num_logprobs: int = 0,
    prompt_logprobs: int | None = None,
    grammar: GrammarSpec | None = None,
) -> SamplingParams:
    """The sampling wishes of a body; the arguments are those that dialects name differently.

    Raises:
        Refusal: a field of the wrong type, or a wish that is not met.
        InputError: a value out of range.
    """
    if fields.values.get("suffix") not in (None, False, "", []):
        raise fields.refused("suffix", "is not supported by this server; leave it out")
    n = fields.integer("n", 1, low=1, high=MAX_N)
    best_of = fields.integer("best_of", None, low=1, high=MAX_N)
    beam_width = fields.integer("beam_width", 0, low=0, high=MAX_N) or 0
    if fields.flag("use_beam_search"):
        # Servers with this field take the width from n or best_of; one beam is the most probable token each time.
        beam_width, best_of = beam_width or max(n or 1, best_of or 1, 2), None
    top_k = fields.integer("top_k", 0, low=-1)
    seed = fields.integer("seed", None)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.integer("min_tokens", 0, low=0) or 0,
        temperature=fields.number("temperature", 1.0, low=0.0, high=100.0),
        top_k=max(top_k or 0, 0),
        top_p=fields.number("top_p", 1.0),
        min_p=fields.number("min_p", 0.0),
        typical_p=fields.number("typical_p", 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, low=0.0, high=100.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        logit_bias=fields.addends("logit_bias"),
        allowed_token_ids=fields.ids("allowed_token_ids") if "allowed_token_ids" in fields else None,
        bad_token_ids=fields.ids("bad_token_ids"),
        bad_words=fields.texts("bad_words"),
        stop=stop,
        include_stop=fields.flag("include_stop_str_in_output"),
        stop_token_ids=fields.ids("stop_token_ids"),
        ignore_eos=fields.flag("ignore_eos"),
        # Some clients send -1 for a random one; the engine's seeds are not negative.
        seed=seed % 2**62 if seed is not None and seed != -1 else None,
        n=n or 1,
        best_of=best_of,
        beam_width=beam_width,
        length_penalty=fields.number("length_penalty", 1.0),
        early_stopping=fields.flag("early_stopping"),
        num_logprobs=num_logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar or guided(fields),
    )


def guided(fields: Fields) -> GrammarSpec | None:
    """The constraint of vLLM's fields."""
    found = [_spec(fields, name, kind) for name, kind in GUIDED.items() if name in fields]
    section = fields.section("structured_outputs")
    if section is not None:
        found += [_spec(section, name, kind) for name, kind in STRUCTURED.items() if name in section]
        if section.flag("json_object"):
            found.append(GrammarSpec(kind=GrammarKind.JSON_OBJECT, text=""))
    if len(found) > 1:
        raise fields.refused("structured_outputs", "several constraints are given; expected one")
    return found[0] if found else None


def response_format(fields: Fields, name: str = "response_format") -> GrammarSpec | None:
    """The constraint of OpenAI's field: text, json_object (with llama.cpp's `schema`) or json_schema."""
    section = fields.section(name)
    if section is None:
        return None
    kind = section.one_of("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise section.wrong("type", "'text', 'json_object' or 'json_schema'")
    if kind == "text":
        return None
    # Chat nests name and schema in `json_schema`; Responses has them beside the type.
    inner = section.section("json_schema") or section
    schema = inner.values.get("schema")
    if schema is None:
        if kind == "json_schema":
            raise inner.wrong("schema", "a JSON schema")
        return GrammarSpec(kind=GrammarKind.JSON_OBJECT, text="")
    if not isinstance(schema, dict | bool):
        raise inner.wrong("schema", "a JSON schema")
    return GrammarSpec(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))


def _spec(fields: Fields, name: str, kind: GrammarKind) -> GrammarSpec:
    value: Any = fields.values[name]
    if kind is GrammarKind.JSON_SCHEMA:
        if not isinstance(value, str | dict | bool):
            raise fields.wrong(name, "a JSON schema, as an object or its text")
        return GrammarSpec(kind=kind, text=value if isinstance(value, str) else json.dumps(value))
    if kind is GrammarKind.CHOICE:
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise fields.wrong(name, "an array of strings, none empty")
        return GrammarSpec(kind=kind, text=json.dumps(value))
    return GrammarSpec(kind=kind, text=fields.needed_text(name))
