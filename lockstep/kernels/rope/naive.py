"""Reference rotary embedding in plain torch.

Legend: T tokens, H heads, D head dim, P table rows, R rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.core.errors import InputError


def rope(x_THD: Tensor, positions_T: Tensor, cos_PR: Tensor, sin_PR: Tensor, interleaved: bool) -> Tensor:
    """Pairs are (r, R + r), or (2r, 2r + 1) where `interleaved`."""
    check_positions(positions_T, cos_PR)
    cos, sin = cos_PR[positions_T].unsqueeze(1), sin_PR[positions_T].unsqueeze(1)
    num = 2 * cos_PR.shape[1]
    rotated, rest = x_THD[..., :num], x_THD[..., num:]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, -1)
    a, b = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned, rest], -1)


def check_positions(positions_T: Tensor, cos_PR: Tensor) -> None:
    """Raises InputError for a position outside of the tables."""
    bad = (positions_T < 0) | (positions_T >= len(cos_PR))
    if bad.any():
        token = int(bad.to(torch.int64).argmax())
        raise InputError(
            f"positions[{token}] is {int(positions_T[token])}; the tables hold 0..{len(cos_PR) - 1}", field="positions"
        )
