"""Keys and values as int8 or int4 codes: how a cache of those types stores a head of a token. A head's codes depend on that
head of that token alone, so the exactness contract holds; what they decode to is not what was written.

int8: x ~ scale * code with code in -127 .. 127 and scale = max |x| / 127.
int4: x ~ low + scale * code with code in 0 .. 15, low = min x and scale = (max x - min x) / 15; dimensions i and
ceil(D / 2) + i share a byte, i in its low half. A head with an element that is not finite decodes to NaN.

Legend: D head dim, C bytes of a head's codes, N numbers beside the codes: (scale) or (scale, low).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

INT4: torch.dtype = torch.uint4  # type: ignore[attr-defined]  # torch's stubs do not have it
NUM_SCALES = {torch.int8: 1, INT4: 2}
"""The types stored as codes, and how many float32 numbers a head of a token has beside them."""
_SMALLEST = 1e-30
"""A spread below this counts as none: its inverse would overflow."""


def num_code_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one head's codes.

    >>> num_code_bytes(64, torch.int8), num_code_bytes(5, torch.uint4)
    (64, 3)
    """
    return head_dim if dtype is torch.int8 else (head_dim + 1) // 2


def encode(x_D: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes [..., C] int8 or uint8, scales [..., N] float32) of float32 [..., D]; rounds half to even."""
    x = x_D.detach()
    finite = torch.isfinite(x).all(-1, keepdim=True)
    x = torch.where(finite, x, torch.zeros(()))
    if dtype is torch.int8:
        low, levels = torch.zeros_like(x[..., :1]), 127
        spread = x.abs().amax(-1, keepdim=True)
    else:
        low, levels = x.amin(-1, keepdim=True), 15
        spread = x.amax(-1, keepdim=True) - low
    # A tensor: a Python number divided by a tensor is a product with its rounded reciprocal.
    inverse = torch.where(spread > _SMALLEST, torch.full((), float(levels)) / spread, torch.zeros(()))
    codes = torch.round((x - low) * inverse)
    scales = torch.cat([spread / levels, low][: NUM_SCALES[dtype]], dim=-1)
    scales = torch.where(finite, scales, torch.full((), torch.nan))
    if dtype is torch.int8:
        return codes.clamp(-127, 127).to(torch.int8), scales
    codes = codes.clamp(0, 15).to(torch.uint8)
    half = num_code_bytes(x.shape[-1], dtype)
    above = functional.pad(codes[..., half:], (0, 2 * half - x.shape[-1]))
    return codes[..., :half] | (above << 4), scales


def decode(codes_C: Tensor, scales_N: Tensor, head_dim: int) -> Tensor:
    """float32 [..., D] of codes [..., C] and scales [..., N]."""
    scale = scales_N[..., :1]
    if codes_C.dtype is torch.int8:
        return codes_C.float() * scale
    codes = torch.cat([codes_C & 15, codes_C >> 4], dim=-1)[..., :head_dim]
    return scales_N[..., 1:] + scale * codes.float()
