"""Counts that a plan is made with, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.core.batch import PAGE


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
