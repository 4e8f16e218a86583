"""Offline generation with a byte-level tokenizer: text pieces, stop strings, grammars, order of results."""

from __future__ import annotations

import json

import pytest
import torch

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import ConfigError, InputError
from lockstep.core.request import FinishReason, Request
from lockstep.core.sampling import GrammarKind, GrammarSpec, SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.llm import LLM
from lockstep.engine.pooling import Pooling
from lockstep.models.families import build_model
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.vocabulary import CHARACTER_OF_BYTE, Kind
from tests.engine.test_exact import LLAMA

EOS = 260


def make(**changes: object) -> LLM:
    tokens = [CHARACTER_OF_BYTE[byte] for byte in range(256)] + ["he", "ll", "hell", "Ġw", "<eos>"]
    tokenizer = Tokenizer.from_gguf_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [int(Kind.NORMAL)] * 260 + [int(Kind.CONTROL)],
            "tokenizer.ggml.merges": ["h e", "l l", "he ll", "Ġ w"],
            "tokenizer.ggml.eos_token_id": EOS,
        }
    )
    values = {"num_pages": 100, "max_sequences": 8, "max_step_tokens": 64} | changes
    return LLM(build_model(LLAMA | {"vocab_size": 264}, 3), tokenizer, EngineConfig(**values), num_threads=1)  # type: ignore[arg-type]


def ascii_only(**params: object) -> SamplingParams:
    return SamplingParams(**{"allowed_token_ids": tuple(range(32, 127)), "max_tokens": 30, "seed": 1} | params)


def test_results_are_in_the_order_of_the_prompts() -> None:
    llm = make(max_queue=3)
    prompts = ["hello", [1, 2, 3], "hell", "w", "a longer prompt than the others"] * 3
    params = [SamplingParams(max_tokens=1 + i % 5, seed=i, n=1 + i % 2, ignore_eos=True) for i in range(len(prompts))]
    results = llm.generate(prompts, params, progress=True)
    for i, (samples, prompt) in enumerate(zip(results, prompts, strict=True)):
        assert [len(sample.tokens) for sample in samples] == [1 + i % 5] * (1 + i % 2)
        assert samples[0].prompt == llm.encode(prompt)
        alone = make().generate(prompt, params[i])[0] if i < 3 else samples
        assert [sample.text for sample in alone] == [sample.text for sample in samples]


def test_text_is_that_of_the_tokens_and_pieces_are_whole_characters() -> None:
    llm = make()
    assert llm.tokenizer is not None
    samples = llm.engine.add(
        Request(id="a", prompt=llm.encode("hello"), params=SamplingParams(max_tokens=60, seed=2, ignore_eos=True, n=2))
    )
    texts = ["", ""]
    while llm.engine.has_work:
        for output in llm.engine.step():
            texts[output.sample.index] += output.text
    for sample, text in zip(samples, texts, strict=True):
        assert sample.text == text == llm.tokenizer.decode(sample.tokens, skip_special=True, continuing=True)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("drafts", [0, 4])
def test_stop_strings(include: bool, drafts: int) -> None:
    llm = make(max_draft_tokens=drafts)
    free = llm.generate("hello", ascii_only())[0][0].text
    stop = free[7:10]
    at = free.index(stop)
    (sample,) = llm.generate("hello", ascii_only(stop=(stop, "never seen"), include_stop=include))[0]
    assert sample.text == free[: at + (3 if include else 0)]
    assert (sample.stop, sample.finish_reason) == (stop, FinishReason.STOP)
    assert len(sample.tokens) == at + 3
    (late,) = llm.generate("hello", ascii_only(stop=(stop,), min_tokens=20))[0]
    assert late.text[:15] == free[:15]
    # A beginning of a stop string is held back, and comes out at the end.
    (held,) = llm.generate("hello", ascii_only(stop=(free[-2:] + "\x00",)))[0]
    assert held.text == free


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_grammars(temperature: float) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "num": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["colour", "num"],
        "additionalProperties": False,
    }
    specs = [
        GrammarSpec(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema)),
        GrammarSpec(kind=GrammarKind.CHOICE, text='["yes", "no"]'),
        GrammarSpec(kind=GrammarKind.REGEX, text="[ab]{5}c"),
    ]
    params = [SamplingParams(max_tokens=120, grammar=spec, temperature=temperature, seed=1, n=2) for spec in specs]
    llm = make()
    results = llm.generate(["a", "b", "c"], params)
    for samples in results:
        assert [sample.finish_reason for sample in samples] == [FinishReason.STOP] * 2
    for sample in results[0]:
        value = json.loads(sample.text)
        assert value["colour"] in ("red", "green")
        assert 0 <= value["num"] <= 99
    assert {sample.text for sample in results[1]} <= {"yes", "no"}
    assert all(len(sample.text) == 6 and sample.text[-1] == "c" for sample in results[2])
    # Forced stretches, such as the names of the fields, come several tokens a step.
    assert llm.engine.counters.num_accepted_tokens > 10
    small = make(num_pages=17, max_sequences=3, max_draft_tokens=3)
    assert [[s.text for s in group] for group in small.generate(["a", "b", "c"], params)] == [
        [s.text for s in group] for group in results
    ]
    with pytest.raises(InputError, match="regex"):
        llm.generate("a", SamplingParams(grammar=GrammarSpec(kind=GrammarKind.REGEX, text="(")))


@pytest.mark.parametrize("pooling", list(Pooling))
def test_embeddings(pooling: Pooling) -> None:
    llm = make()
    texts = ["hello", "a longer text about nothing", "w"]
    vectors = llm.embed(texts, pooling)
    assert vectors.shape == (3, 64)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    for text, vector in zip(texts, vectors, strict=True):
        assert torch.equal(llm.embed(text, pooling)[0], vector)
        ids = torch.tensor(llm.encode(text))
        states = llm.engine.model(ForwardBatch.packed([ids]), None)
        expected = {"mean": states.mean(0), "last": states[-1], "cls": states[0]}[pooling.value]
        torch.testing.assert_close(llm.embed(text, pooling, normalise=False)[0], expected)
    with pytest.raises(InputError, match="1 to 256"):
        llm.embed([[1] * 257])


def test_mistakes() -> None:
    llm = make()
    with pytest.raises(InputError, match="2 params for 1 prompts"):
        llm.generate("a", [SamplingParams(), SamplingParams()])
    with pytest.raises(InputError, match="256"):
        llm.generate(["a", "b"], [SamplingParams(max_tokens=9), SamplingParams(max_tokens=900)])
    assert llm.engine.audit() == []
    assert llm.engine.num_unfinished == 0
    with pytest.raises(ConfigError, match="brings its own tokenizer"):
        LLM("some/name", llm.tokenizer)
    with pytest.raises(InputError, match="no tokenizer"):
        LLM(llm.engine.model, None, EngineConfig(num_pages=4)).generate("a")  # type: ignore[arg-type]
