"""Norms of a language model over the last dimension. A row's bits depend on that row only.

Legend: E model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.gpu import Later
from lockstep.kernels.norm import cpu, naive

IMPLEMENTATIONS: dict[str, Any] = {
    "naive": naive,
    "cpu": cpu,
    "opaque": naive,
    "triton": Later("lockstep.kernels.norm.triton"),
}


def rms_norm(x: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (offset + weight) (Zhang and Sennrich 2019).

    Args:
        x: [..., E].
        offset: 1 for weights stored as their distance from one, as Gemma does.

    Returns:
        [..., E], differentiable with respect to x and the weight.

    Raises:
        InputError: for a weight of another width or dtype.
    """
    if weight_E.shape != x.shape[-1:] or weight_E.dtype is not x.dtype:
        raise _wrong_width("weight", weight_E, x)
    return IMPLEMENTATIONS[native.choose(x, has_triton=True)].rms_norm(x, weight_E, eps, offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass; see `rms_norm`. x and residual are [..., E]."""
    if weight_E.shape != x.shape[-1:] or weight_E.dtype is not x.dtype:
        raise _wrong_width("weight", weight_E, x)
    if residual.shape != x.shape or residual.dtype is not x.dtype:
        raise InputError(
            f"residual is {residual.dtype} {tuple(residual.shape)}; expected {x.dtype} {tuple(x.shape)} as x",
            field="residual",
        )
    return IMPLEMENTATIONS[native.choose(x, has_triton=True)].add_rms_norm(x, residual, weight_E, eps, offset)


def layer_norm(x: Tensor, weight_E: Tensor | None, bias_E: Tensor | None, eps: float) -> Tensor:
    """(x − mean) / sqrt(variance + eps) · weight + bias (Ba et al. 2016), with the biased variance.

    Args:
        x: [..., E].
        weight_E, bias_E: None leaves the part out.

    Returns:
        [..., E], differentiable with respect to x, weight and bias.

    Raises:
        InputError: for a weight or bias of another width or dtype.
    """
    if weight_E is not None and (weight_E.shape != x.shape[-1:] or weight_E.dtype is not x.dtype):
        raise _wrong_width("weight", weight_E, x)
    if bias_E is not None and (bias_E.shape != x.shape[-1:] or bias_E.dtype is not x.dtype):
        raise _wrong_width("bias", bias_E, x)
    return IMPLEMENTATIONS[native.choose(x, has_triton=True)].layer_norm(x, weight_E, bias_E, eps)


def _wrong_width(name: str, tensor: Tensor, x: Tensor) -> InputError:
    return InputError(
        f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {x.dtype} [{x.shape[-1]}], the last size of x",
        field=name,
    )
