"""What the sampler records is what the learner computes, bit for bit: over chunk sizes, cache hits, preemptions, guesses
and thread counts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch

from lockstep.core.batch import ForwardBatch
from lockstep.core.request import Request, Sample
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.engine import Engine, PauseMode
from lockstep.kernels import num_threads, set_num_threads
from lockstep.kernels.logprobs import token_logprobs
from lockstep.models.families import build_model
from lockstep.models.language import LanguageModel
from tests.engine.fake import run

VOCAB = 160
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


@pytest.fixture(params=["fp32", "bf16"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build_model(LLAMA, 7, request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = num_threads()
    yield
    set_num_threads(before)


def learner(model: LanguageModel, samples: list[Sample]) -> list[list[float]]:
    """The log-probabilities of each sample's tokens, but the prompt's first, by one packed forward pass with autograd."""
    sequences = [torch.tensor([*sample.prompt, *sample.tokens]) for sample in samples]
    batch = ForwardBatch.packed(sequences)
    hidden_TE = model(batch, None)
    assert hidden_TE.requires_grad
    found, starts = [], batch.seq_starts.tolist()
    for start, sample in zip(starts, samples, strict=False):
        tokens = torch.tensor([*sample.prompt[1:], *sample.tokens])
        found.append(token_logprobs(model.logits(hidden_TE[start : start + len(tokens)]), tokens).tolist())
    return found


def requests(rng: random.Random, num: int) -> list[Request]:
    shared = tuple(rng.randrange(VOCAB) for _ in range(50))
    made = []
    for index in range(num):
        prompt = shared[: rng.choice((0, 16, 35, 50))] + tuple(
            rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))
        )
        params = SamplingParams(
            max_tokens=rng.randrange(15, 40),
            seed=index,
            temperature=rng.choice((0.0, 1.0)),
            n=rng.choice((1, 1, 2)),
            prompt_logprobs=rng.choice((None, None, 0)),
        )
        made.append(Request(id=f"{index}", prompt=prompt, params=params))
    return made


@pytest.mark.parametrize("seed", range(3))
def test_engine_and_learner_agree_bit_for_bit(
    model: LanguageModel, seed: int, tried: Callable[[str, int], None]
) -> None:
    rng = random.Random(seed)
    wanted = requests(rng, 6)
    texts, num_scored, num_cached = [], 0, 0
    for changes in (
        {"num_pages": 9, "max_sequences": 4, "max_step_tokens": rng.randrange(9, 30)},
        {"num_pages": 200, "max_step_tokens": rng.randrange(70, 400), "max_draft_tokens": 3},
    ):
        set_num_threads(rng.choice((1, 2)))
        engine = Engine(model, None, EngineConfig(**changes))
        samples = [sample for request in wanted for sample in engine.add(request)]
        while engine.has_work:
            engine.step()
            if changes["num_pages"] == 9 and engine.scheduler.running and rng.random() < 0.1:
                engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        assert engine.audit() == []
        assert (engine.counters.num_preemptions > 3) == (changes["num_pages"] == 9)
        num_cached += engine.counters.num_cached_tokens
        for sample, expected in zip(samples, learner(model, samples), strict=True):
            split = len(sample.prompt) - 1
            assert sample.logprobs == expected[split:], sample.request_id
            if sample.prompt_logprobs:
                assert sample.prompt_logprobs == [None, *expected[:split]]
                num_scored += 1
        texts.append([sample.tokens for sample in samples])
        tried("engine: log-probabilities of tokens against the learner's", sum(len(text) for text in texts[-1]))
        tried(
            "engine: samples against the learner, over pools, chunks, hits, preemptions, guesses, threads", len(samples)
        )
    assert texts[0] == texts[1]
    assert num_scored > 0
    assert num_cached > 0


def test_new_weights_are_served_without_a_restart(model: LanguageModel) -> None:
    engine = Engine(model, None, EngineConfig(num_pages=60))
    params = SamplingParams(max_tokens=20, temperature=0.0)
    prompt = tuple(range(3, 40))
    (old,) = engine.add(Request(id="a", prompt=prompt, params=params))
    run(engine)

    @torch.no_grad()
    def update() -> None:
        for parameter in model.parameters():
            parameter.mul_(1.1)

    engine.publish(1, "scaled", mode=PauseMode.WAIT, update=update)
    (new,) = engine.add(Request(id="a", prompt=prompt, params=params))
    run(engine)
    assert new.num_cached == 0
    assert new.logprobs == learner(model, [new])[0][len(prompt) - 1 :]
    assert new.logprobs != old.logprobs
