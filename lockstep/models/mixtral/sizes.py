"""Parameter and cache counts of Mixtral models, and the sizes that were published."""

from __future__ import annotations

from typing import Any

from lockstep.models.mixtral.model import MixtralConfig
from lockstep.models.sizes import ModelSizes, attention_values, gated_values, kv_values


def sizes(config: MixtralConfig) -> ModelSizes:
    """Counted from the config."""
    attention, expert = config.attention(), gated_values(config.width, config.hidden)
    fixed = attention_values(attention) + config.width * config.num_experts + 2 * config.width
    table = config.vocab_size * config.width
    return ModelSizes(
        embedding=table,
        layers=config.num_layers * (fixed + config.num_experts * expert),
        active_layers=config.num_layers * (fixed + config.num_chosen * expert),
        head=0 if config.tied else table,
        other=config.width,
        kv_per_token=config.num_layers * kv_values(attention),
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
"""By name, the fields of config.json that decide the computation."""
