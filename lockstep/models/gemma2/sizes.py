"""Parameter and cache counts of Gemma 2 models, and the sizes that were published."""

from __future__ import annotations

from typing import Any

from lockstep.models.gemma2.model import Gemma2Config
from lockstep.models.sizes import ModelSizes, attention_values, gated_values, kv_values


def sizes(config: Gemma2Config) -> ModelSizes:
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
    "Gemma-2-2B": {
        "architectures": ["Gemma2ForCausalLM"],
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    "Gemma-2-9B": {
        "architectures": ["Gemma2ForCausalLM"],
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    "Gemma-2-27B": {
        "architectures": ["Gemma2ForCausalLM"],
        "vocab_size": 256000,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
        "sliding_window": 4096,
    },
}
"""By name, the fields of config.json that decide the computation."""
