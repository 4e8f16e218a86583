"""Which dimension of which weight of a GPT-2 model is split over tensor-parallel ranks."""

from __future__ import annotations

from lockstep.core.shards import ShardSpec
from lockstep.models.gpt2.model import GPT2Config
from lockstep.models.sharding import Shards, attention_shards, table_shards


def shards(config: GPT2Config) -> Shards:
    """By parameter name."""
    specs = table_shards()
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        specs |= attention_shards(layer, config.attention(index))
        specs[f"{layer}.mlp.up.weight"] = ShardSpec(0, "tp")
        specs[f"{layer}.mlp.up.bias"] = ShardSpec(0, "tp")
        specs[f"{layer}.mlp.down.weight"] = ShardSpec(1, "tp")
    return specs
