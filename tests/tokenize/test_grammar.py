from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lockstep.core.errors import ConfigError, InputError
from lockstep.tokenize import grammar
from lockstep.tokenize.grammar import GrammarCompiler, GrammarMatcher, GrammarSpec
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.vocabulary import CHARACTER_OF_BYTE, Kind
from tests.tokenize.vocabularies import load

pytest.importorskip("llguidance")
EOS = 260
NUM_LOGITS = 300
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    merges = ["h e", "l l", "he ll", "Ġ w"]
    tokens = [CHARACTER_OF_BYTE[byte] for byte in range(256)] + ["he", "ll", "hell", "Ġw", "<eos>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(Kind.NORMAL)] * 260 + [int(Kind.CONTROL)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": EOS,
    }
    return GrammarCompiler(Tokenizer.from_gguf_metadata(metadata), num_logits=NUM_LOGITS)


def allowed(matcher: GrammarMatcher) -> list[int]:
    return grammar.allowed(matcher.mask(), NUM_LOGITS).nonzero()[0].tolist()


def random_text(compiler: GrammarCompiler, spec: GrammarSpec, seed: int, limit: int = 400) -> str | None:
    """Ids drawn evenly from the mask until eos."""
    matcher, draw, data = compiler.compile(spec), random.Random(seed), b""
    for _ in range(limit):
        ids = allowed(matcher)
        assert ids
        assert max(ids) <= EOS
        # eos as soon as it may, so that the texts stay short
        index = EOS if EOS in ids else draw.choice(ids)
        assert matcher.advance(index)
        if index == EOS:
            assert matcher.is_finished
            return data.decode()
        data += {256: b"he", 257: b"ll", 258: b"hell", 259: b" w"}.get(index, bytes([index % 256]))
    return None


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_drawn_fits_the_schema(seed: int, compiler: GrammarCompiler) -> None:
    text = random_text(compiler, GrammarSpec.json_schema(SCHEMA), seed)
    assert text is not None
    value = json.loads(text)
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 8
    assert 0 <= value["age"] <= 150
    assert set(value) <= {"name", "age", "tags"}


def test_regex_choices_and_grammars(compiler: GrammarCompiler) -> None:
    for seed in range(5):
        dated = random_text(compiler, GrammarSpec.regex(r"[0-9]{4}-[0-9]{2}(é|🫠)"), seed)
        assert re.fullmatch(r"\d{4}-\d{2}(é|🫠)", dated or "")
        assert random_text(compiler, GrammarSpec.choices(["yes", "no", 'qu"ote\n', "龜"]), seed) in (
            "yes",
            "no",
            'qu"ote\n',
            "龜",
        )
        assert random_text(compiler, GrammarSpec.grammar('start: "a" rest\nrest: "b" | "c"'), seed) in ("ab", "ac")
        assert random_text(compiler, GrammarSpec.grammar('root ::= "x" ("y" | "z")'), seed) in ("xy", "xz")


def test_blank_space_is_bounded(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec.json_object())
    assert matcher.advance(ord("{"))
    taken = 0
    while taken < 100 and matcher.advance(ord(" ")):
        taken += 1
    assert taken == 16
    assert matcher.advance(ord("}"))


def test_refused_ids_change_nothing(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec.regex("ab+"))
    assert matcher.advance(ord("a"))
    before = allowed(matcher)
    for index in (ord("a"), EOS, 256, NUM_LOGITS - 1, NUM_LOGITS, -1):
        assert not matcher.advance(index)
    assert allowed(matcher) == before == [ord("b")]
    assert not matcher.is_accepting
    assert matcher.advance(ord("b"))
    assert matcher.is_accepting
    assert not matcher.is_finished


def test_copies_rollback_and_reset_are_independent(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec.regex("abc"))
    assert matcher.advance(ord("a"))
    other = matcher.copy()
    assert other.advance(ord("b"))
    assert (allowed(matcher), allowed(other)) == ([ord("b")], [ord("c")])
    other.rollback(2)
    matcher.reset()
    assert allowed(matcher) == allowed(other) == [ord("a")]
    assert allowed(compiler.compile(GrammarSpec.regex("abc"))) == [ord("a")]


def test_words_of_a_mask_hold_the_ids_from_the_lowest_bit_on(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec.json_schema(SCHEMA))
    words = matcher.mask()
    assert (words.dtype, words.shape) == (np.int32, (10,))
    assert [i for i in range(NUM_LOGITS) if int(words[i // 32]) >> (i % 32) & 1] == allowed(matcher)


def test_forced_tokens_are_the_only_way(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec.choices(["hello world one", "hello world two"]))
    forced = matcher.forced_tokens()
    assert len(forced) >= 2
    text = ""
    for index in forced:
        assert allowed(matcher) == [index] or index > 255  # a merged token has shorter ways beside it
        assert matcher.advance(index)
        text += {256: "he", 257: "ll", 258: "hell", 259: " w"}.get(index, chr(index % 256))
    assert "hello world ".startswith(text)


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2"])
def test_forced_tokens_of_real_vocabularies_spell_the_text(name: str) -> None:
    tokenizer = load(name)
    compiler = GrammarCompiler(tokenizer)
    matcher = compiler.compile(GrammarSpec.regex("The answer is 42[.]"))
    text = b""
    while ids := matcher.forced_tokens():
        for index in ids:
            assert matcher.advance(index)
            text += tokenizer.token_bytes(index)
    while not matcher.is_accepting:
        index = int(grammar.allowed(matcher.mask(), tokenizer.vocab_size).nonzero()[0][0])
        assert matcher.advance(index)
        text += tokenizer.token_bytes(index)
    assert text == b"The answer is 42."


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (GrammarSpec.json_schema("{"), "not JSON"),
        (GrammarSpec.json_schema("[1]"), "expected an object"),
        (GrammarSpec.json_schema({"type": "strin"}), "strin"),
        (GrammarSpec.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (GrammarSpec.regex("(unclosed"), "unclosed"),
        (GrammarSpec.choices([]), "one or more"),
        (GrammarSpec.choices(["a", ""]), "none empty"),
        (GrammarSpec.grammar("start: missing"), "missing"),
        (GrammarSpec.grammar("root ::= ("), "cannot be used"),
        (GrammarSpec.grammar(""), "cannot be used"),
    ],
)
def test_bad_specs_name_the_problem(spec: GrammarSpec, match: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(InputError, match=match) as caught:
        compiler.compile(spec)
    assert caught.value.field == spec.kind


def test_what_the_library_knows_of_its_state_is_no_part_of_the_message() -> None:
    error = "lexer error: too many expressions\n<state>\nParser: {}\n</state><grammar>\n</grammar>"
    library: Any = SimpleNamespace(
        unsafe_compute_mask_ptr=lambda address, size: None, is_error=lambda: True, get_error=lambda: error
    )
    with pytest.raises(InputError, match=r"too many expressions$"):
        GrammarMatcher(library, 64, frozenset()).mask()


@pytest.mark.parametrize("seed", range(40))
def test_damaged_schemas_are_refused_or_work(seed: int, compiler: GrammarCompiler) -> None:
    """No crash and no other error, whatever a schema's text becomes."""
    draw = random.Random(seed)
    text = list(json.dumps(SCHEMA))
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(text))
        text[place] = draw.choice(['"', "{", "}", "1", "x", ",", "[", "\\"])
    try:
        matcher = compiler.compile(GrammarSpec.json_schema("".join(text)))
    except InputError:
        return
    assert allowed(matcher)


def test_unknown_kind_and_missing_eos(metadata_of: Any) -> None:
    with pytest.raises(InputError, match="did you mean 'regex'"):
        GrammarSpec("regexp")
    metadata = {k: v for k, v in metadata_of("gpt-2").items() if k != "tokenizer.ggml.eos_token_id"}
    metadata["tokenizer.ggml.token_type"] = [1] * 50257
    with pytest.raises(ConfigError, match="eos"):
        GrammarCompiler(Tokenizer.from_gguf_metadata(metadata))


def test_a_grammar_whose_masks_take_too_long_ends_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repetition of repetitions takes seconds a mask, in which every other stream would wait."""
    seconds = iter((0.0, 1.5, 2.0, 3.0))
    matcher = GrammarCompiler(load("gpt-2")).compile(GrammarSpec.regex("a{5}"))
    monkeypatch.setattr("lockstep.tokenize.grammar.time.thread_time", lambda: next(seconds))
    matcher.mask()
    with pytest.raises(InputError, match=r"took 2\.5 s where 2 are allowed"):
        matcher.mask()
