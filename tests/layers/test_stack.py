"""The compiled call of a whole stack against the layers one by one: the same bits, whatever the weights are stored in."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.core.adapters import AdapterRun
from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import InputError
from lockstep.core.planes import QuantPlanes
from lockstep.kernels import native
from lockstep.kernels.attention import KVCache
from lockstep.layers.low_rank import Adapter
from lockstep.layers.projection import Projection
from lockstep.layers.stack import DecoderLayers
from lockstep.models.adapter import LoraConfig, new_adapter
from lockstep.models.families import build_model, repack
from lockstep.models.language import LanguageModel

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 7},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 7, "sliding_window_pattern": 2},
}


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    if not native.usable():
        pytest.skip("the call exists in the compiled kernels only")
    threads = native.num_threads(), torch.get_num_threads()
    yield
    native.set_num_threads(threads[0])
    torch.set_num_threads(threads[1])


def adapter_of(model: LanguageModel, seed: int, rank: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = new_adapter(model, LoraConfig(rank=rank, alpha=8.0), generator)
    with torch.no_grad():
        for pair in adapter:
            pair.b.normal_(0.0, 0.2, generator=generator)
    return adapter


def planes(num_rows: int, num_columns: int, group: int, bits: int) -> QuantPlanes:
    codes = torch.randint(-8, 8, (num_rows, num_columns), dtype=torch.int8)
    scale = 0.02 * torch.rand(num_rows, num_columns // group) + 0.01
    return QuantPlanes(codes_NK=codes, scale_NB=scale, group=group, bits=bits)


def both(
    model: LanguageModel, kv_dtype: torch.dtype | None = None, adapters: Sequence[Adapter | None] = ()
) -> tuple[Tensor, Tensor]:
    """(one call, layer by layer) over a prefill of two texts and a step of each, each text with its adapter."""
    outputs: list[Tensor] = []
    layers = model.layers
    assert isinstance(layers, DecoderLayers)
    for one_call in (True, False):
        layers._one_call = one_call
        cache, rows = model.new_cache(4, kv_dtype), []
        texts = [torch.arange(19) % 48, torch.arange(5, 12)]
        prefill = ForwardBatch.packed(texts)
        step = ForwardBatch(
            tokens_T=torch.tensor([3, 4]),
            positions_T=torch.tensor([19, 7]),
            seq_starts=torch.tensor([0, 1, 2], dtype=torch.int32),
            context_lens=torch.tensor([20, 8], dtype=torch.int32),
            pages_SP=prefill.pages_SP,
            num_pages=4,
        )
        with torch.no_grad():
            rows = [model(replace(batch, adapters=runs_of(batch, adapters)), cache) for batch in (prefill, step)]
        outputs.append(torch.cat(rows))
        assert (layers._stack is not None) or not one_call
    return outputs[0], outputs[1]


def runs_of(batch: ForwardBatch, adapters: Sequence[Adapter | None]) -> tuple[AdapterRun, ...]:
    spans = zip(pairwise(batch.seq_starts.tolist()), adapters, strict=False)
    return tuple(AdapterRun(*span, adapter) for span, adapter in spans if adapter is not None)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_one_call_takes_adapters(kind: str) -> None:
    model = build_model({**SIZES, "initializer_range": 0.2, **KINDS[kind]}, seed=1, dtype="int8", trainable=False)
    first, other = (adapter_of(model, seed, rank) for seed, rank in ((1, 3), (2, 9)))
    plain, _ = both(model)
    for adapters in ((first, other), (None, first), (other, None)):
        for num_threads in (1, 3):
            native.set_num_threads(num_threads)
            fused, eager = both(model, adapters=adapters)
            assert torch.equal(fused, eager)
        for row, adapter in ((18, adapters[0]), (25, adapters[1]), (26, adapters[0]), (27, adapters[1])):
            assert torch.equal(fused[row], plain[row]) == (adapter is None)


def test_adapters_of_other_models_are_refused() -> None:
    config = {**SIZES, **KINDS["llama"]}
    model = build_model(config, seed=1, trainable=False)
    wider = adapter_of(build_model({**config, "intermediate_size": 160}, seed=1, trainable=False), 1, 2)
    with pytest.raises(InputError, match="is it another model's"):
        both(model, adapters=(None, wider))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_has_the_bits_of_the_layers(kind: str, dtype: str) -> None:
    model = build_model({**SIZES, "initializer_range": 0.2, **KINDS[kind]}, seed=1, dtype=dtype, trainable=False)
    for name, parameter in model.named_parameters():
        torch.manual_seed(len(name))
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    for num_threads in (1, 3):
        native.set_num_threads(num_threads)
        fused, eager = both(model)
        assert torch.isfinite(fused).all()
        assert torch.equal(fused, eager)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.uint4])
def test_one_call_reads_caches_of_codes(kv_dtype: torch.dtype) -> None:
    model = build_model({**SIZES, "initializer_range": 0.2, **KINDS["gemma2"]}, seed=1, trainable=False)
    fused, eager = both(model, kv_dtype)
    assert torch.equal(fused, eager)
    assert not torch.equal(fused, both(model)[0])


def test_matrices_of_several_formats_in_one_projection() -> None:
    torch.manual_seed(0)
    config = {**SIZES, **KINDS["llama"]}
    model = build_model(config, seed=1, dtype="bf16", trainable=False)
    for name, module in model.named_modules():
        if isinstance(module, Projection) and name.endswith("qkv"):
            module.fill([planes(96, 64, 32, 4), planes(48, 64, 32, 4), planes(48, 64, 16, 8)])
            assert len(module.packs()) == 2
            assert module.bias is not None
            module.bias.data.normal_()
        if isinstance(module, Projection) and name.endswith("gate_up"):
            module.fill([planes(96, 64, 32, 8), torch.randn(96, 64) * 0.1])
    fused, eager = both(model)
    assert torch.equal(fused, eager)


def test_an_update_reaches_the_call() -> None:
    model = build_model({**SIZES, **KINDS["qwen3"]}, seed=1, dtype="bf16")
    first, _ = both(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    second, eager = both(model)
    assert torch.equal(second, eager)
    assert not torch.equal(first, second)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    repack(model)
    third, eager = both(model)
    assert torch.equal(third, eager)
    assert not torch.equal(second, third)
    other = build_model({**SIZES, **KINDS["qwen3"]}, seed=2, dtype="bf16")
    model.load_state_dict(other.state_dict(), assign=True)
    fourth, eager = both(model)
    assert torch.equal(fourth, eager)
    assert torch.equal(fourth, both(other)[0])


def test_bad_batches_are_refused() -> None:
    model = build_model({**SIZES, **KINDS["llama"]}, seed=1, trainable=False)
    batch = ForwardBatch.packed([torch.arange(20)])
    with torch.no_grad():
        model(batch, model.new_cache(2))
        with pytest.raises(InputError, match=r"expected one of 0\.\.0"):
            model(batch, model.new_cache(1))
        other = build_model({**SIZES, **KINDS["llama"], "num_key_value_heads": 4}, seed=1, trainable=False)
        with pytest.raises(InputError, match="the cache has 3 layers"):
            model(batch, other.new_cache(2))


def test_each_step_reads_the_cache_it_is_given() -> None:
    """Addresses are kept from step to step: not those of another cache, and not so that they keep its memory."""
    model = build_model({**SIZES, **KINDS["llama"]}, seed=1, trainable=False)
    texts = [torch.arange(9), torch.arange(20, 29)]
    caches = [model.new_cache(1) for _ in texts]
    whole = [model.new_cache(1) for _ in texts]

    def step(text: Tensor, first: int, last: int, cache: KVCache) -> Tensor:
        batch = replace(ForwardBatch.packed([text[:last]]), tokens_T=text[first:last])
        rows = torch.arange(first, last)
        return model(replace(batch, positions_T=rows, seq_starts=torch.tensor([0, last - first]).int()), cache)

    with torch.no_grad():
        in_turn = [step(text, at, at + 1, cache) for at in range(9) for text, cache in zip(texts, caches, strict=True)]
        for start, (text, cache) in enumerate(zip(texts, whole, strict=True)):
            assert torch.equal(torch.cat(in_turn[start::2]), step(text, 0, 9, cache))
    gone = [weakref.ref(cache.layers[0]) for cache in (*caches, *whole)]
    del caches, whole, cache
    assert [ref() for ref in gone] == [None] * 4
