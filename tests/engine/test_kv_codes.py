"""Keys and values stored as int8 and int4: a text still does not depend on what else runs, the error against float32 is
bounded and falls with the bits, and the pool holds the pages that the plan says."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from lockstep.core.batch import PAGE
from lockstep.core.request import Request, Sample
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig, resolve
from lockstep.engine.engine import Engine
from lockstep.kernels import set_num_threads
from lockstep.models.families import build_model
from lockstep.models.language import LanguageModel
from tests.engine.test_exact import LLAMA, VOCAB, requests


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build_model({**LLAMA, "head_dim": 64}, 7, "fp32", trainable=False)


def served(model: LanguageModel, wanted: list[Request], rng: random.Random, **changes: object) -> list[Sample]:
    """All samples, with preemptions at random where the pool is small."""
    engine = Engine(model, None, EngineConfig(**changes))  # type: ignore[arg-type]
    samples = [sample for request in wanted for sample in engine.add(request)]
    while engine.has_work:
        engine.step()
        if changes["num_pages"] == 9 and engine.scheduler.running and rng.random() < 0.1:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
    assert engine.audit() == []
    assert (engine.counters.num_preemptions > 3) == (changes["num_pages"] == 9)
    return samples


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_texts_do_not_depend_on_what_else_runs(
    model: LanguageModel, kv_dtype: str, tried: Callable[[str, int], None]
) -> None:
    rng = random.Random(3)
    wanted = requests(rng, 6)
    set_num_threads(2)
    small = served(model, wanted, rng, kv_dtype=kv_dtype, num_pages=9, max_sequences=4, max_step_tokens=17)
    set_num_threads(1)
    big = served(model, wanted, rng, kv_dtype=kv_dtype, num_pages=200, max_step_tokens=300, max_draft_tokens=3)
    for one, other in zip(small, big, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == other.logprobs
        assert one.prompt_logprobs == other.prompt_logprobs
    tried("engine: samples over int8 and int4 keys, small pool against big", len(big))


def mean_error(model: LanguageModel, kv_dtype: str) -> float:
    """Mean |difference| of a prompt's log-probabilities from those with a float32 cache."""
    prompt = tuple(random.Random(5).randrange(VOCAB) for _ in range(200))
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    found = []
    for dtype in ("float32", kv_dtype):
        engine = Engine(model, None, EngineConfig(kv_dtype=dtype, num_pages=20))
        (sample,) = engine.add(Request(id="a", prompt=prompt, params=params))
        while engine.has_work:
            engine.step()
        found.append(torch.tensor(sample.prompt_logprobs[1:]))
    return float((found[0] - found[1]).abs().mean())


def test_error_against_float32(model: LanguageModel) -> None:
    int8, int4, bfloat16 = (mean_error(model, name) for name in ("int8", "int4", "bfloat16"))
    print(f"mean error of a log-probability: bfloat16 {bfloat16:.5f}, int8 {int8:.5f}, int4 {int4:.5f}")
    assert 0 < int8 < 0.02
    assert 2 * int8 < int4 < 0.3


def test_plan_counts_codes_and_their_scales(model: LanguageModel) -> None:
    heads = 2 * 2 * 2 * PAGE  # layers, keys and values, kv heads, tokens
    for kv_dtype, head_bytes in (("float32", 256), ("bfloat16", 128), ("int8", 64 + 4), ("int4", 32 + 8)):
        config = EngineConfig(kv_dtype=kv_dtype, max_sequences=4, max_step_tokens=64)
        plan = resolve(config, model, 12 * heads * head_bytes + 3)
        assert plan.page_bytes == heads * head_bytes
        assert plan.num_pages == 12
