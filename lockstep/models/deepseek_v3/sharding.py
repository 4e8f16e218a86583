"""Which dimension of which weight of a DeepSeek-V3 model is split over tensor- and expert-parallel ranks."""

from __future__ import annotations

from lockstep.core.shards import ShardSpec
from lockstep.models.deepseek_v3.model import DeepseekV3Config
from lockstep.models.sharding import Shards, expert_shards, gated_shards, table_shards


def shards(config: DeepseekV3Config) -> Shards:
    """By parameter name: heads are split, the latents they come out of are whole on every rank."""
    specs, attention = table_shards(), config.attention()
    hidden = config.num_shared * config.expert_hidden
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        specs |= {
            f"{layer}.attention.q_up.weight": ShardSpec(0, "tp", unit=attention.head_dim),
            f"{layer}.attention.kv_up.weight": ShardSpec(0, "tp", unit=attention.plain_dim + attention.value_dim),
            f"{layer}.attention.out.weight": ShardSpec(1, "tp", unit=attention.value_dim),
        }
        if index < config.num_dense:
            specs |= gated_shards(layer, config.hidden)
        else:
            specs |= expert_shards(layer)
            specs |= {
                f"{layer}.mlp.shared.gate_up.weight": ShardSpec(0, "tp", parts=(hidden, hidden)),
                f"{layer}.mlp.shared.down.weight": ShardSpec(1, "tp"),
            }
    return specs
