"""Which dimension of which weight of a Llama model is split over tensor-parallel ranks."""

from __future__ import annotations

from lockstep.models.llama.model import LlamaConfig
from lockstep.models.sharding import Shards, attention_shards, gated_shards, table_shards


def shards(config: LlamaConfig) -> Shards:
    """By parameter name."""
    specs = table_shards()
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        specs |= attention_shards(layer, config.attention()) | gated_shards(layer, config.hidden, bias=config.mlp_bias)
    return specs
