"""Rotary embedding on a GPU: a head of a token is one program.

Legend: T tokens, H heads, D head dim, P table rows, R rotated pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.gpu import differentiable
from lockstep.kernels.rope import naive


@triton.jit
def _turn(x, positions, cos, sin, y, heads, dim, pairs, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, place = row * dim, tl.load(positions + row // heads) * pairs
    at = tl.arange(0, BLOCK)
    rotated = at < pairs
    if INTERLEAVED:
        first, second = start + 2 * at, start + 2 * at + 1
    else:
        first, second = start + at, start + pairs + at
    a, b = tl.load(x + first, mask=rotated, other=0.0), tl.load(x + second, mask=rotated, other=0.0)
    c, s = tl.load(cos + place + at, mask=rotated, other=0.0), tl.load(sin + place + at, mask=rotated, other=0.0)
    tl.store(y + first, a * c - b * s, mask=rotated)
    tl.store(y + second, b * c + a * s, mask=rotated)
    for rest in range(2 * pairs, dim, BLOCK):
        kept = rest + at < dim
        tl.store(y + start + rest + at, tl.load(x + start + rest + at, mask=kept, other=0.0), mask=kept)


def rope(x_THD: Tensor, positions_T: Tensor, cos_PR: Tensor, sin_PR: Tensor, interleaved: bool) -> Tensor:
    """See `lockstep.kernels.rope`."""
    naive.check_positions(positions_T, cos_PR)

    def run(x: Tensor) -> Tensor:
        x, (tokens, heads, dim) = x.contiguous(), x.shape
        y, pairs = torch.empty_like(x), cos_PR.shape[1]
        if x.numel():
            tables = (positions_T.contiguous(), cos_PR.contiguous(), sin_PR.contiguous())
            block = triton.next_power_of_2(max(pairs, 1))
            _turn[(tokens * heads,)](x, *tables, y, heads, dim, pairs, INTERLEAVED=interleaved, BLOCK=block)
        return y

    def reference(x: Tensor) -> Tensor:
        return naive.rope(x, positions_T, cos_PR, sin_PR, interleaved)

    out: Tensor = differentiable(run, reference, (x_THD,))
    return out
