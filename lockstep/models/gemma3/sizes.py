"""Parameter and cache counts of Gemma 3 models, and the sizes that were published."""

from __future__ import annotations

from typing import Any

from lockstep.models.gemma3.model import Gemma3Config
from lockstep.models.sizes import ModelSizes, attention_values, gated_values, kv_values


def sizes(config: Gemma3Config) -> ModelSizes:
    """Counted from the config."""
    attention = config.attention(0)
    layer = attention_values(attention) + gated_values(config.width, config.hidden) + 4 * config.width
    table = config.vocab_size * config.width
    return ModelSizes(
        embedding=table,
        layers=config.num_layers * layer,
        active_layers=config.num_layers * layer,
        head=0 if config.tied else table,
        other=config.width,
        kv_per_token=config.num_layers * kv_values(attention),
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    "Gemma-3-270M": {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
    },
    "Gemma-3-1B": {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
    },
}
"""By name, the fields of config.json that decide the computation."""
