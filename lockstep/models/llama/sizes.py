"""Parameter and cache counts of Llama models."""

from __future__ import annotations

from lockstep.models.llama.model import LlamaConfig
from lockstep.models.sizes import ModelSizes


def sizes(config: LlamaConfig) -> ModelSizes:
    """Counted from the config."""
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    attention = config.width * (2 * heads + 2 * kv_heads)
    attention += (heads + 2 * kv_heads) * config.qkv_bias + config.width * config.out_bias
    mlp = 3 * config.width * config.hidden + (2 * config.hidden + config.width) * config.mlp_bias
    layers = config.num_layers * (attention + mlp + 2 * config.width)
    table = config.vocab_size * config.width
    return ModelSizes(
        embedding=table,
        layers=layers,
        active_layers=layers,
        head=0 if config.tied else table,
        other=config.width,
        kv_per_token=2 * config.num_layers * kv_heads,
    )
