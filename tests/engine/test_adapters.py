"""Many adapters in one engine: each sample is what the learner computes with its adapter, whatever runs beside it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lockstep.core.batch import ForwardBatch
from lockstep.core.digest import effective_digest
from lockstep.core.errors import ConfigError, InputError
from lockstep.core.request import Request, Sample, WeightsVersion
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.engine import Engine, PauseMode
from lockstep.engine.llm import LLM
from lockstep.interop.hf.peft import save_adapter
from lockstep.kernels.logprobs import token_logprobs
from lockstep.layers.low_rank import Adapter
from lockstep.models.adapter import LoraConfig, merge_adapter, new_adapter
from lockstep.models.digest import adapter_digest, weights_digest
from lockstep.models.families import build_model
from lockstep.models.language import LanguageModel
from tests.engine.fake import run
from tests.engine.test_exact import LLAMA

PROMPT = tuple(range(3, 43))


def adapter_of(model: LanguageModel, seed: int, rank: int = 4) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = new_adapter(model, LoraConfig(rank=rank, alpha=8.0), generator)
    with torch.no_grad():
        for pair in adapter:
            pair.b.normal_(0.0, 0.2, generator=generator)
    return adapter


def learner(model: LanguageModel, adapter: Adapter | None, sample: Sample) -> list[float]:
    tokens = torch.tensor([*sample.prompt, *sample.tokens])
    hidden_TE = model(ForwardBatch.packed([tokens], adapter), None)
    assert hidden_TE.requires_grad == (adapter is not None)
    first = len(sample.prompt) - 1
    return token_logprobs(model.logits(hidden_TE[first:-1]), tokens[first + 1 :]).tolist()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_samples_of_many_adapters_are_the_learners(dtype: str) -> None:
    rng = random.Random(0)
    model = build_model(LLAMA, 7, dtype, trainable=False)
    adapters = {"": None, **{name: adapter_of(model, seed, 2 + seed) for seed, name in enumerate("abc")}}
    texts = []
    for changes in ({"num_pages": 14, "max_step_tokens": 21, "max_sequences": 6}, {"num_pages": 200}):
        engine = Engine(model, None, EngineConfig(**changes))
        for name, adapter in adapters.items():
            if adapter is not None:
                engine.adapters.load(name, adapter, WeightsVersion(3, adapter_digest(adapter)))
        samples = {}
        for index in range(12):
            name = "abc"[index % 3] if index % 4 else ""
            params = SamplingParams(max_tokens=16, seed=index, temperature=float(index % 2))
            prompt = (*PROMPT[: 16 * (index % 3)], 60 + index % 3)
            (sample,) = engine.add(Request(id=f"{index}", prompt=prompt, params=params, adapter=name))
            samples[index] = name, sample
        while engine.has_work:
            engine.step()
            if engine.scheduler.running and rng.random() < 0.1:
                engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        assert engine.audit() == []
        for name, sample in samples.values():
            adapter = adapters[name]
            assert sample.logprobs == learner(model, adapter, sample)
            digest = effective_digest("", adapter_digest(adapter)) if adapter is not None else ""
            assert set(sample.versions) == {WeightsVersion(3 if name else 0, digest)}
        texts.append([sample.tokens for _, sample in samples.values()])
    assert texts[0] == texts[1]


def test_prefixes_belong_to_one_adapter_as_it_was_loaded() -> None:
    model = build_model(LLAMA, 7, trainable=False)
    engine = Engine(model, None, EngineConfig(num_pages=100))
    params = SamplingParams(max_tokens=4, temperature=0.0)

    def cached(name: str) -> int:
        (sample,) = engine.add(Request(id="x", prompt=PROMPT, params=params, adapter=name))
        run(engine)
        return sample.num_cached

    for name, seed in (("a", 1), ("b", 2)):
        engine.adapters.load(name, adapter_of(model, seed), WeightsVersion(0, name))
    assert [cached(name) for name in ("", "a", "b")] == [0, 0, 0]
    assert [cached(name) for name in ("", "a", "b")] == [32, 32, 32]
    engine.adapters.load("a", adapter_of(model, 3), WeightsVersion(1, "new"))
    assert [cached(name) for name in ("a", "b", "a")] == [0, 32, 32]
    engine.adapters.unload("a")
    with pytest.raises(InputError, match=r"unknown adapter 'a'.*Known: b"):
        cached("a")
    with pytest.raises(InputError, match="unknown adapter"):
        engine.adapters.unload("a")
    with pytest.raises(InputError, match="without spaces"):
        engine.adapters.load(" a", adapter_of(model, 3), WeightsVersion(1, "new"))
    assert engine.audit() == []


def test_what_began_with_an_adapter_ends_with_it() -> None:
    model = build_model(LLAMA, 7, trainable=False)
    old, new = adapter_of(model, 1), adapter_of(model, 2)
    engine = Engine(model, None, EngineConfig(num_pages=100))
    engine.adapters.load("a", old, WeightsVersion(0, "old"))
    params = SamplingParams(max_tokens=20, seed=1)
    (first,) = engine.add(Request(id="1", prompt=PROMPT, params=params, adapter="a"))
    while len(first.tokens) < 5:
        engine.step()
    engine.adapters.load("a", new, WeightsVersion(1, "new"))
    (second,) = engine.add(Request(id="2", prompt=PROMPT, params=params, adapter="a"))
    engine.scheduler.preempt(engine.scheduler.running[0])
    engine.adapters.unload("a")
    run(engine)
    assert first.logprobs == learner(model, old, first)
    assert second.logprobs == learner(model, new, second)
    assert {w.version for w in first.versions} == {0}
    assert {w.version for w in second.versions} == {1}


@pytest.mark.parametrize("mode", [PauseMode.WAIT, PauseMode.KEEP, PauseMode.RECOMPUTE])
def test_an_adapter_changes_in_place_as_weights_do(mode: PauseMode) -> None:
    """Zero copy: the learner's own tensors are served."""
    model = build_model(LLAMA, 7, trainable=False)
    adapter = adapter_of(model, 1)
    engine = Engine(model, None, EngineConfig(num_pages=100), weights=WeightsVersion(5, weights_digest(model)))
    engine.adapters.load("a", adapter, WeightsVersion(0, adapter_digest(adapter)))
    params = SamplingParams(max_tokens=30, seed=1)
    (running,) = engine.add(Request(id="1", prompt=PROMPT, params=params, adapter="a"))
    while len(running.tokens) < 5:
        engine.step()

    @torch.no_grad()
    def update() -> None:
        for pair in adapter:
            pair.b.mul_(2.0)

    before = weights_digest(model, adapter)
    update()
    after = adapter_digest(adapter)
    with torch.no_grad():
        for pair in adapter:
            pair.b.div_(2.0)
    engine.publish(1, after, mode=mode, update=update, adapter="a")
    with pytest.raises(ConfigError, match=r"still drains" if mode is PauseMode.WAIT else r"versions must rise"):
        engine.publish(2 if mode is PauseMode.WAIT else 1, after, adapter="a")
    run(engine)
    (sample,) = engine.add(Request(id="2", prompt=PROMPT, params=params, adapter="a"))
    run(engine)
    # Recomputing publishes pages of the new numbers.
    assert (sample.num_cached == 0) == (mode is not PauseMode.RECOMPUTE)
    assert sample.logprobs == learner(model, adapter, sample)
    assert set(sample.versions) == {WeightsVersion(1, weights_digest(model, adapter))}
    assert running.versions[0] == WeightsVersion(0, before)
    assert (running.versions[-1] == sample.versions[0]) == (mode is not PauseMode.WAIT)
    assert engine.weights.version == 5
    assert engine.audit() == []
    if mode is PauseMode.RECOMPUTE:
        assert running.logprobs[8:] == learner(model, adapter, running)[8:]


def test_merged_weights_agree_within_rounding() -> None:
    model = build_model(LLAMA, 7)
    adapter = adapter_of(model, 1)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    engine = Engine(model, None, EngineConfig(num_pages=60))
    engine.adapters.load("a", adapter, WeightsVersion(0, "a"))
    (with_adapter,) = engine.add(Request(id="1", prompt=PROMPT, params=params, adapter="a"))
    run(engine)
    merge_adapter(model, adapter)
    engine.publish(1, "merged")
    (merged,) = engine.add(Request(id="1", prompt=PROMPT, params=params))
    run(engine)
    assert merged.tokens == with_adapter.tokens
    torch.testing.assert_close(torch.tensor(merged.logprobs), torch.tensor(with_adapter.logprobs), rtol=1e-4, atol=1e-4)


def test_offline_generation_with_a_folder(tmp_path: Path) -> None:
    model = build_model(LLAMA, 7, trainable=False)
    adapter = adapter_of(model, 1)
    save_adapter(adapter, tmp_path / "a")
    llm = LLM(model, config=EngineConfig(num_pages=60), num_threads=1)
    llm.load_adapter("a", tmp_path / "a")
    ((sample,),) = llm.generate([PROMPT], SamplingParams(max_tokens=5, seed=1), adapter="a")
    assert sample.logprobs == learner(model, adapter, sample)
    assert sample.versions[0].digest == effective_digest("", adapter_digest(adapter))


def test_digest_is_of_what_is_computed_with() -> None:
    trained = build_model(LLAMA, 7, "bf16")
    packed = build_model(LLAMA, 7, "bf16", trainable=False)
    digest = weights_digest(trained)
    state = {key: value.to(torch.bfloat16).float() for key, value in trained.state_dict().items()}
    for name, module in packed.named_modules():
        other = dict(trained.named_modules())[name]
        if name.endswith(("qkv", "out", "gate_up", "down", "head")):
            module.fill(other.parts())  # type: ignore[operator, union-attr]
        elif name == "embedding":
            module.fill(other.table())  # type: ignore[operator, union-attr]
    assert weights_digest(packed) == digest
    trained.load_state_dict(state)
    assert weights_digest(trained) == digest
    with torch.no_grad():
        trained.layers[1].mlp_norm.weight[3] += 1e-3  # type: ignore[index, union-attr]
    assert weights_digest(trained) != digest
    assert weights_digest(build_model(LLAMA, 7)) != digest
    assert weights_digest(build_model(LLAMA, 7)) == weights_digest(build_model(LLAMA, 7, trainable=False))
