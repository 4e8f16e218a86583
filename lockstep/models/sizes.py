"""Counts that a plan is made with, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.core.batch import PAGE
from lockstep.layers.attention import AttentionConfig


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Numbers of values; bytes depend on the type they are stored in."""

    embedding: int
    layers: int
    """Of all layers together."""
    head: int
    """0 where it is the embedding's."""
    other: int
    """Final norm and what else lies outside the layers."""
    active_layers: int
    """What a token is multiplied with in the layers: less than `layers` in a mixture of experts."""
    kv_per_token: int
    """Keys and values of one token in all layers."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.layers + self.head + self.other

    def kv_page_bytes(self, bytes_per_value: int) -> int:
        """Of one page of the cache, all layers."""
        return self.kv_per_token * PAGE * bytes_per_value


def attention_values(config: AttentionConfig) -> int:
    """Parameters of one layer's attention, its norms of queries and keys included."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = config.width * (2 * heads + 2 * kv_heads)
    biases = (heads + 2 * kv_heads) * config.qkv_bias + config.width * config.out_bias
    return matrices + biases + (0 if config.qk_norm_eps is None else 2 * config.head_dim)


def gated_values(width: int, hidden: int) -> int:
    """Parameters of one gated feed-forward without biases."""
    return 3 * width * hidden


def kv_values(config: AttentionConfig) -> int:
    """Keys and values of one token in one layer."""
    return 2 * config.num_kv_heads * config.head_dim
