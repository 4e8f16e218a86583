"""Parameter and cache counts of DeepSeek-V3 models, and the sizes that were published."""

from __future__ import annotations

from typing import Any

from lockstep.layers.latent import LatentConfig
from lockstep.models.deepseek_v3.model import DeepseekV3Config
from lockstep.models.sizes import ModelSizes, gated_values


def sizes(config: DeepseekV3Config) -> ModelSizes:
    """Counted from the config, without what is added to scores when experts are chosen: no gradient reaches it."""
    attention, expert = config.attention(), gated_values(config.width, config.expert_hidden)
    num_sparse = config.num_layers - config.num_dense
    fixed = config.num_layers * (_attention_values(attention) + 2 * config.width)
    fixed += config.num_dense * gated_values(config.width, config.hidden)
    fixed += num_sparse * (config.width * config.rule.num_experts + config.num_shared * expert)
    table = config.vocab_size * config.width
    return ModelSizes(
        embedding=table,
        layers=fixed + num_sparse * config.rule.num_experts * expert,
        active_layers=fixed + num_sparse * config.rule.num_chosen * expert,
        head=0 if config.tied else table,
        other=config.width,
        kv_per_token=config.num_layers * 2 * config.num_heads * attention.head_dim,
    )


def _attention_values(config: LatentConfig) -> int:
    queries, latent = config.num_heads * config.head_dim, config.kv_rank + config.rope_dim
    values = config.q_rank * (config.width + 1) + (config.q_rank or config.width) * queries
    values += config.width * latent + config.kv_rank
    values += config.kv_rank * config.num_heads * (config.plain_dim + config.value_dim)
    values += config.num_heads * config.value_dim * config.width
    return values + config.bias * (config.q_rank + latent + config.width)


PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
}
"""By name, the fields of config.json that decide the computation."""
