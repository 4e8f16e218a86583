"""Gemma 2 checkpoints: config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.models.config_reader import ACTIVATIONS, ConfigReader
from lockstep.models.gemma2.model import Gemma2Config
from lockstep.models.weight_table import Entry, WeightTable


def read_config(values: Mapping[str, Any]) -> Gemma2Config:
    """From config.json.

    Raises:
        ConfigError: a field is missing, out of range, or changes the computation in a way we do not have.
    """
    reader = ConfigReader(values, "gemma2")
    width, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    num_layers = reader.integer("num_hidden_layers")
    max_context = reader.integer("max_position_embeddings", 8192)
    window = reader.integer("sliding_window", 4096)
    # Files name the activation twice; the second is a leftover that Transformers does not read.
    reader.ignore(["hidden_act"])
    reader.expect("use_bidirectional_attention", False)
    reader.expect("attention_bias", False)
    config = Gemma2Config(
        vocab_size=reader.integer("vocab_size"),
        width=width,
        hidden=reader.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", num_heads),
        head_dim=reader.integer("head_dim", 256),
        max_context=max_context,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=reader.rope(max_context),
        activation=reader.word("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        tied=reader.flag("tie_word_embeddings", True),
        windows=reader.windows(window, [index % 2 == 0 for index in range(num_layers)]),
        score_scale=reader.number("query_pre_attn_scalar", 256.0) ** -0.5,
        score_softcap=reader.softcap("attn_logit_softcapping", 50.0),
        final_softcap=reader.softcap("final_logit_softcapping", 30.0),
    )
    reader.finish()
    return config


def table(config: Gemma2Config) -> WeightTable:
    """Names of the tensors of one checkpoint."""
    entries = [Entry("embedding", ("model.embed_tokens",))]
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        entries += [
            Entry(f"{ours}.attention_norm", (f"{theirs}.input_layernorm",)),
            Entry(f"{ours}.attention.qkv", tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")),
            Entry(f"{ours}.attention.out", (f"{theirs}.self_attn.o_proj",)),
            Entry(f"{ours}.attention_out_norm", (f"{theirs}.post_attention_layernorm",)),
            Entry(f"{ours}.mlp_norm", (f"{theirs}.pre_feedforward_layernorm",)),
            Entry(f"{ours}.mlp_out_norm", (f"{theirs}.post_feedforward_layernorm",)),
            Entry(f"{ours}.mlp.gate_up", (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")),
            Entry(f"{ours}.mlp.down", (f"{theirs}.mlp.down_proj",)),
        ]
    entries.append(Entry("norm", ("model.norm",)))
    if not config.tied:
        entries.append(Entry("head", ("lm_head",)))
    return WeightTable(tuple(entries))
