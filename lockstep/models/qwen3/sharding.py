"""Which dimension of which weight of a Qwen3 model is split over tensor-parallel ranks."""

from __future__ import annotations

from lockstep.models.qwen3.model import Qwen3Config
from lockstep.models.sharding import Shards, attention_shards, gated_shards, table_shards


def shards(config: Qwen3Config) -> Shards:
    """By parameter name."""
    specs = table_shards()
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        specs |= attention_shards(layer, config.attention(index)) | gated_shards(layer, config.hidden)
    return specs
