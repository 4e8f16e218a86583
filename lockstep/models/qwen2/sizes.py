"""Parameter and cache counts of Qwen2 models, and the sizes that were published."""

from __future__ import annotations

from typing import Any

from lockstep.models.qwen2.model import Qwen2Config
from lockstep.models.sizes import ModelSizes, attention_values, gated_values, kv_values


def sizes(config: Qwen2Config) -> ModelSizes:
    """Counted from the config."""
    attention = config.attention(0)
    layer = attention_values(attention) + gated_values(config.width, config.hidden) + 2 * config.width
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
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-1.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-3B": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
    },
}
"""By name, the fields of config.json that decide the computation."""
