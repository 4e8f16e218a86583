"""Qwen3 checkpoints: config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.models.config_reader import ACTIVATIONS, ConfigReader
from lockstep.models.qwen3.model import Qwen3Config
from lockstep.models.weight_table import Entry, WeightTable


def read_config(values: Mapping[str, Any]) -> Qwen3Config:
    """From config.json.

    Raises:
        ConfigError: a field is missing, out of range, or changes the computation in a way we do not have.
    """
    reader = ConfigReader(values, "qwen3")
    width, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    num_layers = reader.integer("num_hidden_layers")
    max_context = reader.integer("max_position_embeddings", 32768)
    # The upper layers have a window, those below `max_window_layers` do not, unless `layer_types` says otherwise.
    window = reader.integer("sliding_window", 4096, minimum=0) if reader.flag("use_sliding_window", False) else 0
    first = reader.integer("max_window_layers", 28, minimum=0)
    reader.ignore(["sliding_window"])
    windows = reader.windows(window, [window > 0 and index >= first for index in range(num_layers)])
    config = Qwen3Config(
        vocab_size=reader.integer("vocab_size"),
        width=width,
        hidden=reader.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", num_heads),
        head_dim=reader.integer("head_dim", 128),
        max_context=max_context,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=reader.rope(max_context),
        activation=reader.word("hidden_act", ACTIVATIONS, "silu"),
        tied=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("attention_bias", False),
        windows=windows,
    )
    reader.finish()
    return config


def table(config: Qwen3Config) -> WeightTable:
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
            Entry(f"{ours}.mlp.gate_up", (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")),
            Entry(f"{ours}.mlp.down", (f"{theirs}.mlp.down_proj",)),
        ]
    entries.append(Entry("norm", ("model.norm",)))
    if not config.tied:
        entries.append(Entry("head", ("lm_head",)))
    return WeightTable(tuple(entries))
