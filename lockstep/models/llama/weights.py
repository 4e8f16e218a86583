"""Llama checkpoints: config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.models.config_reader import ACTIVATIONS, ConfigReader
from lockstep.models.llama.model import LlamaConfig
from lockstep.models.weight_table import Entry, WeightTable


def read_config(values: Mapping[str, Any]) -> LlamaConfig:
    """From config.json.

    Raises:
        ConfigError: a field is missing, out of range, or changes the computation in a way we do not have.
    """
    reader = ConfigReader(values, "llama")
    width, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    max_context = reader.integer("max_position_embeddings", 2048)
    # InternLM writes "bias" and "qkv_bias" for what Llama calls attention_bias and mlp_bias.
    attention_bias, bias = reader.flag("attention_bias", False), reader.flag("bias", False)
    internlm1 = reader.take("model_type") == "internlm"
    config = LlamaConfig(
        vocab_size=reader.integer("vocab_size"),
        width=width,
        hidden=reader.integer("intermediate_size"),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", num_heads),
        head_dim=reader.integer("head_dim", width // num_heads),
        max_context=max_context,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=reader.rope(max_context),
        activation=reader.word("hidden_act", ACTIVATIONS, "silu"),
        tied=reader.flag("tie_word_embeddings", False),
        qkv_bias=reader.flag("qkv_bias", False) or attention_bias or (internlm1 and bias),
        out_bias=attention_bias or bias,
        mlp_bias=reader.flag("mlp_bias", False) or (bias and not internlm1),
        window=_window(reader),
    )
    reader.finish()
    return config


def _window(reader: ConfigReader) -> int:
    """Mistral's first release leaves the window out of some configs and means 4096; null means none."""
    is_mistral = reader.take("model_type") == "mistral"
    if is_mistral and "sliding_window" not in reader.values:
        return 4096
    return reader.integer("sliding_window", 0, minimum=0)


def table(config: LlamaConfig) -> WeightTable:
    """Names of the tensors of one checkpoint."""
    entries = [Entry("embedding", ("model.embed_tokens",))]
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        entries += [
            Entry(f"{ours}.attention_norm", (f"{theirs}.input_layernorm",)),
            Entry(f"{ours}.attention.qkv", tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")),
            Entry(f"{ours}.attention.out", (f"{theirs}.self_attn.o_proj",)),
            Entry(f"{ours}.mlp_norm", (f"{theirs}.post_attention_layernorm",)),
            Entry(f"{ours}.mlp.gate_up", (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")),
            Entry(f"{ours}.mlp.down", (f"{theirs}.mlp.down_proj",)),
        ]
    entries.append(Entry("norm", ("model.norm",)))
    if not config.tied:
        entries.append(Entry("head", ("lm_head",)))
    return WeightTable(tuple(entries))
