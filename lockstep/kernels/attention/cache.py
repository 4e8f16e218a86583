"""The paged key-value cache: pages of PAGE tokens that sequences refer to by number.

Legend: P pages, G kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.core.batch import PAGE
from lockstep.core.errors import ConfigError

KV_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values. Keys are transposed inside a page, so that one vector holds the same dimension of all
    its keys."""

    k: Tensor
    """[P, G, D, PAGE]."""
    v: Tensor
    """[P, G, PAGE, D]."""

    @staticmethod
    def allocate(num_pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> LayerCache:
        """Pages with undefined content: no key is read before it was written.

        Raises:
            ConfigError: a dtype that keys are not stored in.
        """
        if dtype not in KV_DTYPES:
            raise ConfigError(f"kv dtype is {dtype}; expected one of {', '.join(map(str, KV_DTYPES))}")
        return LayerCache(
            k=torch.empty(num_pages, kv_heads, head_dim, PAGE, dtype=dtype),
            v=torch.empty(num_pages, kv_heads, PAGE, head_dim, dtype=dtype),
        )

    @property
    def num_pages(self) -> int:
        return int(self.k.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype


@dataclass(frozen=True)
class KVCache:
    """All layers; a page number means the same page in each."""

    layers: Sequence[LayerCache]
    num_pages: int

    @staticmethod
    def allocate(num_layers: int, num_pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVCache:
        """Layers of one shape.

        >>> cache = KVCache.allocate(2, 8, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
        >>> cache.layers[0].k.shape, cache.num_bytes
        (torch.Size([8, 2, 64, 16]), 131072)
        """
        layers = tuple(LayerCache.allocate(num_pages, kv_heads, head_dim, dtype) for _ in range(num_layers))
        return KVCache(layers, num_pages)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in (layer.k, layer.v))
