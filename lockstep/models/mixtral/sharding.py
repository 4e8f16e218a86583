"""Which dimension of which weight of a Mixtral model is split over tensor- and expert-parallel ranks."""

from __future__ import annotations

from lockstep.models.mixtral.model import MixtralConfig
from lockstep.models.sharding import Shards, attention_shards, expert_shards, table_shards


def shards(config: MixtralConfig) -> Shards:
    """By parameter name."""
    specs = table_shards()
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        specs |= attention_shards(layer, config.attention()) | expert_shards(layer)
    return specs
