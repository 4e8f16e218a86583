"""The paged key-value cache: pages of PAGE tokens that sequences refer to by number.

Legend: P pages, G kv heads, D head dim, C bytes of a head's codes, N numbers beside the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.core.batch import PAGE
from lockstep.core.errors import ConfigError
from lockstep.kernels.attention.codes import INT4, NUM_SCALES, decode, encode, num_code_bytes

KV_DTYPES = (torch.float32, torch.bfloat16, torch.int8, INT4)
"""The last two are stored as codes: see `codes`."""


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's keys and values. Keys are transposed inside a page, so that one vector holds the same dimension of all
    its keys."""

    k: Tensor
    """[P, G, D, PAGE]; of codes [P, G, C, PAGE], int8 or uint8."""
    v: Tensor
    """[P, G, PAGE, D]; of codes [P, G, PAGE, C]."""
    k_scale: Tensor | None
    """float32 [P, G, N, PAGE] beside codes, else None."""
    v_scale: Tensor | None
    dtype: torch.dtype
    """float32, bfloat16, int8 or uint4."""
    head_dim: int

    @staticmethod
    def allocate(
        num_pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> LayerCache:
        """Pages with undefined content: no key is read before it was written.

        Raises:
            ConfigError: a dtype that keys are not stored in.
        """
        if dtype not in KV_DTYPES:
            raise ConfigError(f"kv dtype is {dtype}; expected one of {', '.join(map(str, KV_DTYPES))}")
        is_coded = dtype in NUM_SCALES
        width = num_code_bytes(head_dim, dtype) if is_coded else head_dim
        stored = torch.uint8 if dtype is INT4 else dtype
        scales = (num_pages, kv_heads, NUM_SCALES[dtype], PAGE) if is_coded else None
        return LayerCache(
            k=torch.empty(num_pages, kv_heads, width, PAGE, dtype=stored, device=device),
            v=torch.empty(num_pages, kv_heads, PAGE, width, dtype=stored, device=device),
            k_scale=None if scales is None else torch.empty(scales, device=device),
            v_scale=None if scales is None else torch.empty(scales, device=device),
            dtype=dtype,
            head_dim=head_dim,
        )

    @property
    def num_pages(self) -> int:
        return int(self.k.shape[0])

    @property
    def kv_heads(self) -> int:
        return int(self.k.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a page has a part in."""
        return tuple(x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None)

    def put(self, page: Tensor, slot: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Writes tokens, one for each pair of page and slot."""
        k, v = k_TGD.detach(), v_TGD.detach()
        if self.k_scale is not None and self.v_scale is not None:
            (k, k_scale), (v, v_scale) = encode(k, self.dtype), encode(v, self.dtype)
            self.k_scale[page, :, :, slot], self.v_scale[page, :, :, slot] = k_scale, v_scale
        self.k[page, :, :, slot], self.v[page, :, slot] = k.to(self.k.dtype), v.to(self.v.dtype)

    def read(self, pages: Tensor, num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first `num` keys and values [num, G, D] of these pages in order, decoded."""
        k = self.k[pages].permute(0, 3, 1, 2).flatten(0, 1)[:num]
        v = self.v[pages].transpose(1, 2).flatten(0, 1)[:num]
        if self.k_scale is not None and self.v_scale is not None:
            scales = (x[pages].permute(0, 3, 1, 2).flatten(0, 1)[:num] for x in (self.k_scale, self.v_scale))
            k, v = (decode(x, scale, self.head_dim) for x, scale in zip((k, v), scales, strict=True))
        return k.to(dtype), v.to(dtype)


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
        >>> KVCache.allocate(2, 8, kv_heads=2, head_dim=64, dtype=torch.int8).num_bytes
        69632
        """
        layers = tuple(LayerCache.allocate(num_pages, kv_heads, head_dim, dtype) for _ in range(num_layers))
        return KVCache(layers, num_pages)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """All that each of the pages holds, in every layer; no page is both read and written."""
        read, written = torch.tensor(sources), torch.tensor(targets)
        for layer in self.layers:
            for tensor in layer.tensors:
                tensor[written.to(tensor.device)] = tensor[read.to(tensor.device)]
