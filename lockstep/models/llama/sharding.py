"""Which dimension of which weight of a Llama model is split over tensor-parallel ranks."""

from __future__ import annotations

from lockstep.core.shards import ShardSpec
from lockstep.models.llama.model import LlamaConfig


def shards(config: LlamaConfig) -> dict[str, ShardSpec]:
    """By parameter name; what is not named is whole on every rank. Biases of row-split matrices are added once."""
    dim = config.head_dim
    heads = (config.num_heads * dim, config.num_kv_heads * dim, config.num_kv_heads * dim)
    specs = {"embedding.weight": ShardSpec(0, "tp"), "head.weight": ShardSpec(0, "tp")}
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        specs[f"{layer}.attention.qkv.weight"] = ShardSpec(0, "tp", parts=heads, unit=dim)
        specs[f"{layer}.attention.out.weight"] = ShardSpec(1, "tp", unit=dim)
        specs[f"{layer}.mlp.gate_up.weight"] = ShardSpec(0, "tp", parts=(config.hidden, config.hidden))
        specs[f"{layer}.mlp.down.weight"] = ShardSpec(1, "tp")
        if config.qkv_bias:
            specs[f"{layer}.attention.qkv.bias"] = ShardSpec(0, "tp", parts=heads, unit=dim)
        if config.mlp_bias:
            specs[f"{layer}.mlp.gate_up.bias"] = ShardSpec(0, "tp", parts=(config.hidden, config.hidden))
    return specs
