"""Qwen3 mixture-of-experts checkpoints: config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.models.config_reader import ACTIVATIONS, ConfigReader
from lockstep.models.qwen3_moe.model import Qwen3MoeConfig
from lockstep.models.weight_table import Entry, WeightTable


def read_config(values: Mapping[str, Any]) -> Qwen3MoeConfig:
    """From config.json.

    Raises:
        ConfigError: a field is missing, out of range, or changes the computation in a way we do not have.
    """
    reader = ConfigReader(values, "qwen3_moe")
    width, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    num_layers = reader.integer("num_hidden_layers")
    max_context = reader.integer("max_position_embeddings", 32768)
    window = reader.integer("sliding_window", 4096, minimum=0) if reader.flag("use_sliding_window", False) else 0
    reader.ignore(["sliding_window", "max_window_layers"])
    step, plain = reader.integer("decoder_sparse_step", 1), reader.take("mlp_only_layers") or ()
    config = Qwen3MoeConfig(
        vocab_size=reader.integer("vocab_size"),
        width=width,
        hidden=reader.integer("intermediate_size"),
        expert_hidden=reader.integer("moe_intermediate_size"),
        num_experts=reader.integer("num_experts") if reader.has("num_experts") else reader.integer("num_local_experts"),
        num_chosen=reader.integer("num_experts_per_tok"),
        normalise=reader.flag("norm_topk_prob", False),
        sparse=tuple(index not in plain and (index + 1) % step == 0 for index in range(num_layers)),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", num_heads),
        head_dim=reader.integer("head_dim", width // num_heads),
        max_context=max_context,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=reader.rope(max_context),
        activation=reader.word("hidden_act", ACTIVATIONS, "silu"),
        tied=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("attention_bias", False),
        window=window,
    )
    reader.finish()
    return config


def table(config: Qwen3MoeConfig) -> WeightTable:
    """Names of the tensors of one checkpoint."""
    entries = [Entry("embedding", ("model.embed_tokens",))]
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        entries += [
            Entry(f"{ours}.attention_norm", (f"{theirs}.input_layernorm",)),
            Entry(f"{ours}.attention.qkv", tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")),
            Entry(f"{ours}.attention.out", (f"{theirs}.self_attn.o_proj",)),
            Entry(f"{ours}.attention.q_norm", (f"{theirs}.self_attn.q_norm",)),
            Entry(f"{ours}.attention.k_norm", (f"{theirs}.self_attn.k_norm",)),
            Entry(f"{ours}.mlp_norm", (f"{theirs}.post_attention_layernorm",)),
        ]
        if config.sparse[index]:
            experts = f"{theirs}.mlp.experts.{{}}"
            entries += [
                Entry(f"{ours}.mlp.router", (f"{theirs}.mlp.gate",)),
                Entry(f"{ours}.mlp.gate_up", (f"{experts}.gate_proj", f"{experts}.up_proj")),
                Entry(f"{ours}.mlp.down", (f"{experts}.down_proj",)),
            ]
        else:
            entries += [
                Entry(f"{ours}.mlp.gate_up", (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")),
                Entry(f"{ours}.mlp.down", (f"{theirs}.mlp.down_proj",)),
            ]
    entries.append(Entry("norm", ("model.norm",)))
    if not config.tied:
        entries.append(Entry("head", ("lm_head",)))
    return WeightTable(tuple(entries))
