"""Which dimension of which weight of a Qwen3 mixture-of-experts model is split over tensor- and expert-parallel ranks."""

from __future__ import annotations

from lockstep.models.qwen3_moe.model import Qwen3MoeConfig
from lockstep.models.sharding import Shards, attention_shards, expert_shards, gated_shards, table_shards


def shards(config: Qwen3MoeConfig) -> Shards:
    """By parameter name."""
    specs = table_shards()
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        specs |= attention_shards(layer, config.attention())
        specs |= expert_shards(layer) if config.sparse[index] else gated_shards(layer, config.hidden)
    return specs
