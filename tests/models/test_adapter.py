"""Adapters on whole models: what the sampler computes is what the learner computes, gradients reach A and B only, merging
agrees within rounding, and PEFT agrees with us about the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.core.adapters import AdapterRun
from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import ConfigError, InputError
from lockstep.layers.low_rank import Adapter
from lockstep.models.adapter import LoraConfig, adapter_slots, merge_adapter, new_adapter
from lockstep.models.families import build_model
from lockstep.models.language import LanguageModel
from tests.models.test_families import FAMILIES, tiny

TEXTS = [torch.arange(3, 22), torch.arange(40, 10, -1), torch.tensor([7])]


def with_numbers(adapter: Adapter, seed: int = 1) -> Adapter:
    """As after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in adapter:
            pair.b.normal_(0.0, 0.3, generator=generator)
    return adapter


def made(family: str, dtype: str = "fp32", *, trainable: bool = False, **lora: Any) -> tuple[LanguageModel, Adapter]:
    config = {**tiny(family), "initializer_range": 0.2}
    model = build_model(config, 3, dtype, trainable=trainable).requires_grad_(False)
    return model, with_numbers(new_adapter(model, LoraConfig(**({"rank": 4, "alpha": 8.0} | lora))))


def served(model: LanguageModel, runs: tuple[AdapterRun, ...], batch: ForwardBatch) -> Tensor:
    with torch.no_grad():
        return model(ForwardBatch(**{**vars(batch), "adapters": runs}), model.new_cache(batch.num_pages))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_learner_and_server_agree_bit_for_bit(family: str, dtype: str) -> None:
    model, adapter = made(family, dtype)
    batch = ForwardBatch.packed(TEXTS, adapter)
    learner = model(batch, None)
    assert learner.requires_grad
    assert torch.equal(learner.detach(), served(model, batch.adapters, batch))
    # Alone, and beside rows of another adapter and of none.
    other = with_numbers(new_adapter(model, LoraConfig(rank=3)), seed=2)
    starts = batch.seq_starts.tolist()
    mixed = served(model, (AdapterRun(0, starts[1], adapter), AdapterRun(starts[2], starts[3], other)), batch)
    base = model(ForwardBatch.packed(TEXTS), None)
    assert torch.equal(mixed[: starts[1]], learner[: starts[1]].detach())
    assert torch.equal(mixed[starts[1] : starts[2]], base[starts[1] : starts[2]])
    assert torch.equal(mixed[starts[2] :], model(ForwardBatch.packed(TEXTS[2:], other), None).detach())
    assert not torch.equal(base, learner)
    assert torch.equal(model(batch.with_adapter(None), None), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_agrees_within_rounding(family: str) -> None:
    model, adapter = made(family, trainable=True, rank_stabilised=family == "llama")
    batch = ForwardBatch.packed(TEXTS, adapter)
    expected = model(batch, None).detach()
    merge_adapter(model, adapter)
    torch.testing.assert_close(model(batch.with_adapter(None), None), expected, rtol=1e-4, atol=1e-4)
    packed, adapter = made(family)
    merge_adapter(packed, adapter)
    if family != "llama":
        torch.testing.assert_close(packed(batch.with_adapter(None), None), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_gradients_are_those_of_the_merged_weights(family: str) -> None:
    """d/dB and d/dA of the adapter from dL/dW of a trainable model that holds W + scale B A."""
    model, adapter = made(family, trainable=True)
    batch = ForwardBatch.packed(TEXTS, adapter)
    weight = torch.linspace(-1.0, 1.0, 32)
    (model(batch, None) * weight).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    merge_adapter(model, adapter)
    model.requires_grad_(True)
    (model(batch.with_adapter(None), None) * weight).sum().backward()
    modules = dict(model.named_modules())
    for pair in adapter:
        slot, path, expert = pair.slot, pair.slot.path, None
        if path not in modules:
            path, expert = path.rsplit(".", 1)
        grad = modules[path].weight.grad if expert is None else modules[path].weight.grad[int(expert)]
        dw_NK = grad[slot.first_column : slot.first_column + slot.out_size]
        scale = grad.abs().max()
        torch.testing.assert_close(pair.a.grad, pair.scale * dw_NK.T @ pair.b.T, rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(pair.b.grad, pair.scale * pair.a.T @ dw_NK.T, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_an_adapter_learns_beside_a_frozen_base(dtype: str) -> None:
    model, _ = made("qwen2", dtype)
    adapter = new_adapter(model, LoraConfig(rank=4))
    batch = ForwardBatch.packed(TEXTS, adapter)
    base = model(batch.with_adapter(None), None)
    assert torch.equal(model(batch, None).detach(), base)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        logits = model.logits(model(batch, None)[:18])
        loss = torch.nn.functional.cross_entropy(logits, TEXTS[0][1:])
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model(batch.with_adapter(None), None), base)
    assert torch.equal(model(batch, None).detach(), served(model, batch.adapters, batch))


def test_targets() -> None:
    model, _ = made("qwen2")
    assert len(adapter_slots(model)) == 2 * 7
    names = [pair.slot.name for pair in new_adapter(model, LoraConfig(targets=("v_proj", "down")))]
    assert names == [
        *("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"),
        *("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"),
    ]
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        new_adapter(model, LoraConfig(targets=("q_prj",)))
    with pytest.raises(ConfigError, match="name no matrix"):
        new_adapter(made("qwen3_moe")[0], LoraConfig(targets=("up",)))
    with pytest.raises(ConfigError, match="rank=0"):
        LoraConfig(rank=0)
    first, second = (new_adapter(model, LoraConfig(), torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    stable = new_adapter(model, LoraConfig(rank=16, alpha=8.0, rank_stabilised=True))
    assert {pair.scale for pair in stable} == {2.0}


def test_state_is_taken_whole_or_not_at_all() -> None:
    model, adapter = made("llama")
    other = with_numbers(new_adapter(model, LoraConfig(rank=4, alpha=8.0)), seed=9)
    tensors = {name: tensor.clone() for name, tensor in other.tensors().items()}
    before = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    name = list(tensors)[3]
    for bad, match in (
        ({k: v for k, v in tensors.items() if k != name}, "is missing"),
        ({**tensors, "model.layers.9.lora_A.weight": tensors[name]}, "unknown adapter tensor"),
        ({**tensors, name: tensors[name][:, :2]}, "has shape"),
        ({**tensors, name: tensors[name] * float("nan")}, "NaN"),
    ):
        with pytest.raises(InputError, match=match):
            adapter.fill(bad)
        assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.tensors().items())
    adapter.fill(tensors)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in adapter.tensors().items())
    adapter.load_state_dict(with_numbers(new_adapter(model, LoraConfig(rank=4, alpha=8.0)), seed=1).state_dict())
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.tensors().items())


def test_another_models_adapter_and_quantised_merging_are_refused(tmp_path: Path) -> None:
    model, adapter = made("llama", "int8")
    with pytest.raises(ConfigError, match="is quantised"):
        merge_adapter(model, adapter)
    config = {**tiny("llama"), "intermediate_size": 96}
    with pytest.raises(InputError, match="another model's"):
        build_model(config, 1)(ForwardBatch.packed(TEXTS, adapter), None)
