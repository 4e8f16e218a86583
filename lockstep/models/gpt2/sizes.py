"""Parameter and cache counts of GPT-2 models, and the sizes that were published. GPT-3's has GPT-2's dense attention here; the
paper's alternates it with a sparse pattern that was never released."""

from __future__ import annotations

from typing import Any

from lockstep.models.gpt2.model import GPT2Config
from lockstep.models.sizes import ModelSizes, attention_values, kv_values


def sizes(config: GPT2Config) -> ModelSizes:
    """Counted from the config."""
    mlp = 2 * config.width * config.hidden + config.width + config.hidden
    layer = attention_values(config.attention(0)) + mlp + 4 * config.width
    table = config.vocab_size * config.width
    return ModelSizes(
        embedding=table,
        layers=config.num_layers * layer,
        active_layers=config.num_layers * layer,
        head=0 if config.tied else table,
        other=config.max_context * config.width + 2 * config.width,
        kv_per_token=config.num_layers * kv_values(config.attention(0)),
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    "GPT-2": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
    },
    "GPT-2-medium": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 1024,
        "n_layer": 24,
        "n_head": 16,
        "n_positions": 1024,
    },
    "GPT-2-large": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 1280,
        "n_layer": 36,
        "n_head": 20,
        "n_positions": 1024,
    },
    "GPT-2-XL": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "n_positions": 1024,
    },
    "GPT-3-175B": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 12288,
        "n_layer": 96,
        "n_head": 96,
        "n_positions": 2048,
    },
}
"""By name, the fields of config.json that decide the computation."""
