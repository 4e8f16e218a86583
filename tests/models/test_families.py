"""What every family declares about itself: sizes, shards, refusals. The numbers are checked in tests/parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import ConfigError, FormatError, InputError
from lockstep.layers.projection import Precision
from lockstep.models.dict_source import DictSource
from lockstep.models.families import ARCHITECTURES, PUBLISHED, build_model, family_of, hf_tensors, load_model
from lockstep.models.language import LanguageModel

# Parameters as the model cards and the files of the releases have them, tied heads counted once.
RELEASED = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Mixtral-8x7B": 46_702_792_704,
    "DeepSeek-V3": 671_026_404_352,
    "GPT-2": 124_439_808,
    "GPT-2-medium": 354_823_168,
    "GPT-2-large": 774_030_080,
    "GPT-2-XL": 1_557_611_200,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-2-27B": 27_227_128_320,
    "Gemma-3-270M": 268_098_176,
    "Gemma-3-1B": 999_885_952,
}

TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
DEEPSEEK = {
    **{"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 2},
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def tiny(family: str) -> dict[str, Any]:
    """A config.json of the family."""
    values = dict(GPT2 if family == "gpt2" else TINY)
    if family == "deepseek_v3":
        shared = ("num_key_value_heads", "head_dim", "num_experts")
        return {
            "architectures": [FAMILIES[family]],
            **{name: value for name, value in TINY.items() if name not in shared},
            **DEEPSEEK,
        }
    if family == "mixtral":
        values["num_local_experts"] = values.pop("num_experts")
    if family not in ("mixtral", "qwen3_moe"):
        values.pop("num_experts", None)
        values.pop("num_experts_per_tok", None)
    if family != "qwen3_moe":
        values.pop("moe_intermediate_size", None)
    return {"architectures": [FAMILIES[family]], **values}


@pytest.fixture(params=FAMILIES)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return tiny(request.param)


def test_every_architecture_has_a_tiny_config_here() -> None:
    assert {id(ARCHITECTURES[name]) for name in FAMILIES.values()} == {id(one) for one in ARCHITECTURES.values()}


@pytest.mark.parametrize("name", RELEASED)
def test_counted_sizes_are_the_released_ones(name: str) -> None:
    family = family_of(PUBLISHED[name])
    assert family.sizes(family.read_config(PUBLISHED[name])).total == RELEASED[name]


def test_published_sizes_are_all_counted() -> None:
    assert set(PUBLISHED) - set(RELEASED) == {"GPT-3-175B"}
    family = family_of(PUBLISHED["GPT-3-175B"])
    assert abs(family.sizes(family.read_config(PUBLISHED["GPT-3-175B"])).total / 1e9 - 174.6) < 0.1


def test_sizes_are_those_of_the_model(config: dict[str, Any]) -> None:
    model, family = build_model(config, seed=1), family_of(config)
    counted = family.sizes(family.read_config(config))
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    cache = model.new_cache(3)
    assert cache.num_bytes == 3 * counted.kv_page_bytes(4)
    assert counted.active_layers <= counted.layers


def test_shards_are_declared_for_real_tensors_and_join_again(config: dict[str, Any]) -> None:
    model, family = build_model(config, seed=1), family_of(config)
    state, specs = model.state_dict(), family.shards(family.read_config(config))
    assert set(specs) <= set(state)
    split = 0
    for name, spec in specs.items():
        pieces = [spec.shard(state[name], rank, 2) for rank in range(2)]
        assert all(piece.numel() * 2 == state[name].numel() for piece in pieces)
        assert torch.equal(spec.join(pieces), state[name])
        split += state[name].numel()
    # What stays whole is norms, biases, routers and learned positions.
    assert split > 0.85 * sum(tensor.numel() for tensor in state.values())


def test_merged_heads_are_split_by_head() -> None:
    values = tiny("llama")
    family = family_of(values)
    spec = family.shards(family.read_config(values))["layers.0.attention.qkv.weight"]
    rows = torch.arange((4 + 2 + 2) * 8).reshape(-1, 1)
    # Rank 1 has query heads 2 and 3, key head 1, value head 1.
    assert spec.shard(rows, 1, 2).flatten().tolist() == [*range(16, 32), *range(40, 48), *range(56, 64)]
    with pytest.raises(ConfigError, match="tp=4 does not divide 2 units"):
        spec.shard(rows, 0, 4)


def test_same_seed_same_weights(config: dict[str, Any]) -> None:
    first, again, other = (build_model(config, seed) for seed in (1, 1, 2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.embedding.table(), other.embedding.table())  # type: ignore[arg-type]


def _checkpoint(config: dict[str, Any]) -> dict[str, Tensor]:
    return hf_tensors(build_model(config, seed=3), config)


def test_missing_tensor_is_named(config: dict[str, Any]) -> None:
    tensors = _checkpoint(config)
    for name in list(tensors)[:: max(1, len(tensors) // 5)]:
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(FormatError, match=f"no tensor '{name}'"):
            load_model(DictSource(left, config))


def test_a_config_far_beyond_its_checkpoint_costs_nothing(config: dict[str, Any]) -> None:
    """A layer's norm alone would be four gigabytes here."""
    width = "n_embd" if "n_embd" in config else "hidden_size"
    source = DictSource(_checkpoint(config), {**config, width: 10**9 // 3840 * 3840})
    with pytest.raises(FormatError, match=r"the config describes a model of .* weights and the checkpoint holds"):
        load_model(source)


def test_misshaped_tensor_is_named(config: dict[str, Any]) -> None:
    tensors = _checkpoint(config)
    for name in list(tensors)[:: max(1, len(tensors) // 5)]:
        wrong = torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)
        with pytest.raises(FormatError, match=f"tensor '{name}' has shape"):
            load_model(DictSource({**tensors, name: wrong}, config))


def test_unexpected_tensor_is_named(config: dict[str, Any]) -> None:
    tensors = _checkpoint(config)
    with pytest.raises(FormatError, match=r"model does not: model\.layers\.9\.extra\.weight"):
        load_model(DictSource({**tensors, "model.layers.9.extra.weight": torch.zeros(2)}, config))


def test_tensors_that_change_nothing_pass() -> None:
    config = tiny("gpt2")
    tensors = _checkpoint(config)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.zeros(1, 1, 64, 64)
    first, second = load_model(DictSource(tensors, config)), load_model(DictSource(bare, config))
    assert torch.equal(_logits(first), _logits(second))
    config = {**tiny("llama"), "tie_word_embeddings": True}
    tensors = {**_checkpoint(config), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    load_model(DictSource(tensors, config))


def _logits(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model.logits(model(ForwardBatch.packed([torch.arange(5)]), None))


def test_unknown_field_is_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="use_alibi=True, which lockstep does not support"):
        build_model({**config, "use_alibi": True}, seed=0)
    build_model({**config, "use_alibi": False, "torch_dtype": "bfloat16", "quantization_config": None}, seed=0)


def test_missing_or_wrong_field_is_refused_by_name(config: dict[str, Any]) -> None:
    width = "n_embd" if "n_embd" in config else "hidden_size"
    with pytest.raises(ConfigError, match=f"no '{width}'"):
        build_model({name: value for name, value in config.items() if name != width}, seed=0)
    for wrong in (0, -1, 1.5, "64", True):
        with pytest.raises(ConfigError, match=f"{width}="):
            build_model({**config, width: wrong}, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausaLM"]}, "did you mean 'LlamaForCausalLM'"),
        ({"architectures": None}, "architectures=None"),
        ({"hidden_act": "relu6"}, "hidden_act='relu6'"),
        ({"rope_scaling": {"rope_type": "su"}}, "unknown rope_type 'su'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has no 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "unknown key of linear rope scaling"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_configs_that_cannot_be_run(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model({**tiny("llama"), **change}, seed=0)


def test_mistral_without_a_window_field_has_its_default() -> None:
    values = {**tiny("llama"), "model_type": "mistral"}
    family = family_of(values)
    assert family.read_config(values).window == 4096
    assert family.read_config({**values, "sliding_window": None}).window == 0
    assert family.read_config(tiny("llama")).window == 0


def test_internlm_names_its_biases_in_its_own_way() -> None:
    read = family_of(tiny("llama")).read_config
    first = read({**tiny("llama"), "model_type": "internlm", "bias": True})
    assert (first.qkv_bias, first.out_bias, first.mlp_bias) == (True, True, False)
    third = read({**tiny("llama"), "model_type": "internlm3", "bias": False, "qkv_bias": True})
    assert (third.qkv_bias, third.out_bias, third.mlp_bias) == (True, False, False)


def test_context_has_an_end(config: dict[str, Any]) -> None:
    model = build_model(config, seed=0, trainable=False)
    with torch.no_grad(), pytest.raises(InputError, match="context holds 64"):
        model(ForwardBatch.packed([torch.zeros(65, dtype=torch.int64)]), None)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_packed_models_stay_near_the_float_one(config: dict[str, Any], dtype: str) -> None:
    tensors = _checkpoint(config)
    exact = _logits(load_model(DictSource(tensors, config), "fp32"))
    near = _logits(load_model(DictSource(tensors, config), dtype))
    error = float((near - exact).norm() / exact.norm())
    assert 0 < error < {"bf16": 0.02, "int8": 0.05, "int4": 0.5}[dtype]


def test_packed_only_weights_pass_gradients_to_their_input() -> None:
    config = tiny("llama")
    trained = build_model(config, seed=0, dtype="bf16")
    packed = load_model(DictSource(hf_tensors(trained, config), config), "bf16")
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    gradients = []
    for model in (packed, trained):
        hidden = torch.linspace(-1, 1, 64).reshape(2, 32).requires_grad_()
        model.head(hidden).square().sum().backward()
        assert hidden.grad is not None
        gradients.append(hidden.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-2, atol=1e-4)


def test_integers_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match="int8 weights are integers"):
        build_model(tiny("llama"), seed=0, dtype="int8")


def test_an_optimiser_step_reaches_the_packed_weights(config: dict[str, Any]) -> None:
    model = build_model(config, seed=0, dtype="bf16")
    batch = ForwardBatch.packed([torch.arange(6)])
    before = model.logits(model(batch, None))
    before.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    fresh = build_model(config, seed=0, dtype="bf16")
    fresh.load_state_dict(model.state_dict())
    after = _logits(model)
    assert torch.equal(after, _logits(fresh))
    assert not torch.equal(after, before[:5])


def test_precision_is_checked() -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'int2'"):
        Precision.of("int2", trainable=False)
    with pytest.raises(ConfigError, match="group is 48"):
        Precision.of("int4", trainable=False, group=48)
