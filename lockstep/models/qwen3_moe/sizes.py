"""Parameter and cache counts of Qwen3 mixture-of-experts models, and the sizes that were published."""

from __future__ import annotations

from typing import Any

from lockstep.models.qwen3_moe.model import Qwen3MoeConfig
from lockstep.models.sizes import ModelSizes, attention_values, gated_values, kv_values


def sizes(config: Qwen3MoeConfig) -> ModelSizes:
    """Counted from the config."""
    attention, expert = config.attention(), gated_values(config.width, config.expert_hidden)
    num_sparse = sum(config.sparse)
    fixed = config.num_layers * (attention_values(attention) + 2 * config.width)
    fixed += num_sparse * config.width * config.num_experts
    fixed += (config.num_layers - num_sparse) * gated_values(config.width, config.hidden)
    table = config.vocab_size * config.width
    return ModelSizes(
        embedding=table,
        layers=fixed + num_sparse * config.num_experts * expert,
        active_layers=fixed + num_sparse * config.num_chosen * expert,
        head=0 if config.tied else table,
        other=config.width,
        kv_per_token=config.num_layers * kv_values(attention),
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 40960,
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}
"""By name, the fields of config.json that decide the computation."""
