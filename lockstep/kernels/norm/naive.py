"""Reference norms in plain torch; sums are folded, so that a row's bits depend on the row alone.

Legend: E model width.
"""

from __future__ import annotations

from torch import Tensor

from lockstep.kernels.folding import fold_sum


def rms_norm(x: Tensor, weight_E: Tensor, eps: float, offset: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (offset + weight)."""
    inverse = (fold_sum(x * x) / x.shape[-1] + eps).rsqrt().unsqueeze(-1)
    return x * inverse * (weight_E + offset)


def add_rms_norm(x: Tensor, residual: Tensor, weight_E: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum)."""
    total = x + residual
    return rms_norm(total, weight_E, eps, offset), total


def layer_norm(x: Tensor, weight_E: Tensor | None, bias_E: Tensor | None, eps: float) -> Tensor:
    """(x − mean) / sqrt(variance + eps) · weight + bias, with the biased variance."""
    centred = x - (fold_sum(x) / x.shape[-1]).unsqueeze(-1)
    y = centred * (fold_sum(centred * centred) / x.shape[-1] + eps).rsqrt().unsqueeze(-1)
    y = y if weight_E is None else y * weight_E
    return y if bias_E is None else y + bias_E
