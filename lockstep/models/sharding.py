"""Shard declarations of the shared layers, put together by the families."""

from __future__ import annotations

from lockstep.core.shards import ShardSpec
from lockstep.layers.attention import AttentionConfig

Shards = dict[str, ShardSpec]
"""By parameter name; what is not named is whole on every rank."""


def table_shards() -> Shards:
    """Embedding and head by vocabulary."""
    return {"embedding.weight": ShardSpec(0, "tp"), "head.weight": ShardSpec(0, "tp")}


def attention_shards(layer: str, config: AttentionConfig) -> Shards:
    """q, k and v by heads; the output matrix by the heads it reads, its bias whole, to be added once."""
    dim = config.head_dim
    heads = (config.num_heads * dim, config.num_kv_heads * dim, config.num_kv_heads * dim)
    specs = {
        f"{layer}.attention.qkv.weight": ShardSpec(0, "tp", parts=heads, unit=dim),
        f"{layer}.attention.out.weight": ShardSpec(1, "tp", unit=dim),
    }
    if config.qkv_bias:
        specs[f"{layer}.attention.qkv.bias"] = ShardSpec(0, "tp", parts=heads, unit=dim)
    return specs


def gated_shards(layer: str, hidden: int, *, bias: bool = False) -> Shards:
    """gate and up by hidden units, down by those it reads."""
    specs = {
        f"{layer}.mlp.gate_up.weight": ShardSpec(0, "tp", parts=(hidden, hidden)),
        f"{layer}.mlp.down.weight": ShardSpec(1, "tp"),
    }
    if bias:
        specs[f"{layer}.mlp.gate_up.bias"] = ShardSpec(0, "tp", parts=(hidden, hidden))
    return specs


def expert_shards(layer: str) -> Shards:
    """Whole experts on each rank; the router everywhere."""
    return {
        f"{layer}.mlp.gate_up.weight": ShardSpec(0, "ep"),
        f"{layer}.mlp.down.weight": ShardSpec(0, "ep"),
    }
