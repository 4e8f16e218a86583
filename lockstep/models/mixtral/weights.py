"""Mixtral checkpoints: config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.models.config_reader import ACTIVATIONS, ConfigReader
from lockstep.models.mixtral.model import MixtralConfig
from lockstep.models.weight_table import Entry, WeightTable


def read_config(values: Mapping[str, Any]) -> MixtralConfig:
    """From config.json.

    Raises:
        ConfigError: a field is missing, out of range, or changes the computation in a way we do not have.
    """
    reader = ConfigReader(values, "mixtral")
    width, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    max_context = reader.integer("max_position_embeddings", 131072)
    reader.ignore(["router_jitter_noise"])
    config = MixtralConfig(
        vocab_size=reader.integer("vocab_size"),
        width=width,
        hidden=reader.integer("intermediate_size"),
        num_experts=reader.integer("num_local_experts", 8),
        num_chosen=reader.integer("num_experts_per_tok", 2),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", num_heads),
        head_dim=reader.integer("head_dim", width // num_heads),
        max_context=max_context,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=reader.rope(max_context),
        activation=reader.word("hidden_act", ACTIVATIONS, "silu"),
        tied=reader.flag("tie_word_embeddings", False),
        window=reader.integer("sliding_window", 0, minimum=0),
    )
    reader.finish()
    return config


def table(config: MixtralConfig) -> WeightTable:
    """Names of the tensors of one checkpoint."""
    entries = [Entry("embedding", ("model.embed_tokens",))]
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        entries += [
            Entry(f"{ours}.attention_norm", (f"{theirs}.input_layernorm",)),
            Entry(f"{ours}.attention.qkv", tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")),
            Entry(f"{ours}.attention.out", (f"{theirs}.self_attn.o_proj",)),
            Entry(f"{ours}.mlp_norm", (f"{theirs}.post_attention_layernorm",)),
            Entry(f"{ours}.mlp.router", (f"{theirs}.block_sparse_moe.gate",)),
            Entry(
                f"{ours}.mlp.gate_up",
                (f"{theirs}.block_sparse_moe.experts.{{}}.w1", f"{theirs}.block_sparse_moe.experts.{{}}.w3"),
            ),
            Entry(f"{ours}.mlp.down", (f"{theirs}.block_sparse_moe.experts.{{}}.w2",)),
        ]
    entries.append(Entry("norm", ("model.norm",)))
    if not config.tied:
        entries.append(Entry("head", ("lm_head",)))
    return WeightTable(tuple(entries))
