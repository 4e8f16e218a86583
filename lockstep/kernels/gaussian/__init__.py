"""Diagonal-normal heads, plain and squashed by tanh.

Legend: M rows, A action dimensions, P = 2A distribution parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.gaussian import cpu, naive, opaque

IMPLEMENTATIONS = {"naive": naive, "cpu": cpu, "opaque": opaque}


def gaussian_evaluate(mean_MA: Tensor, log_std: Tensor, actions_MA: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of given actions, and differential entropy.

    Args:
        mean_MA: float32.
        log_std: [A] shared by the rows, or [M, A].
        actions_MA: float32; no gradient flows to it.

    Returns:
        (logprob_M, entropy_M), sums over A, differentiable with respect to mean and log_std.
    """
    _check(mean_MA, log_std, actions_MA, "actions")
    out: tuple[Tensor, Tensor] = IMPLEMENTATIONS[native.choose(mean_MA)].evaluate(mean_MA, log_std, actions_MA)
    return out


def gaussian_sample(mean_MA: Tensor, log_std: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    """mean + exp(log_std) * normal and its log-density, with the bits of `gaussian_evaluate`; `None` takes the mean.

    Returns:
        (actions_MA, logprob_M). Not differentiable.
    """
    _check(mean_MA, log_std, normal_MA, "normal")
    with torch.no_grad():
        out: tuple[Tensor, Tensor] = IMPLEMENTATIONS[native.choose(mean_MA)].sample(mean_MA, log_std, normal_MA)
    return out


def squashed_gaussian_sample(mean_MA: Tensor, log_std_MA: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    """tanh(mean + exp(log_std) * normal), reparameterised; `None` takes tanh(mean).

    The log-density carries the tanh correction in the form 2 (log 2 - u - softplus(-2u)) (Haarnoja et al. 2018,
    appendix C), which is finite for every u.

    Returns:
        (actions_MA strictly inside (-1, 1), logprob_M), differentiable with respect to mean and log_std.
    """
    _check(mean_MA, log_std_MA, normal_MA, "normal")
    if log_std_MA.dim() == 1:
        log_std_MA = log_std_MA.expand_as(mean_MA)
    out: tuple[Tensor, Tensor] = IMPLEMENTATIONS[native.choose(mean_MA)].squashed_sample(mean_MA, log_std_MA, normal_MA)
    return out


def squashed_gaussian_head(params_MP: Tensor, bounds: tuple[float, float], normal_MA: Tensor) -> tuple[Tensor, Tensor]:
    """`squashed_gaussian_sample` of a network's output: its columns are mean and log-std, which is clamped to `bounds`
    (its gradient is 0 outside), P = 2A.

    Returns:
        (actions_MA, logprob_M), differentiable with respect to params.

    Raises:
        InputError: params is not [M, 2A].
    """
    num, width = normal_MA.shape
    if params_MP.shape != (num, 2 * width):
        raise InputError(f"params is {tuple(params_MP.shape)}; expected {(num, 2 * width)}", field="params")
    if native.choose(params_MP) == "cpu":
        return cpu.squashed_head(params_MP, bounds, normal_MA)
    mean_MA, log_std_MA = params_MP.split(width, dim=-1)
    return squashed_gaussian_sample(mean_MA.contiguous(), log_std_MA.clamp(*bounds).contiguous(), normal_MA)


def _check(mean_MA: Tensor, log_std: Tensor, other_MA: Tensor | None, name: str) -> None:
    shape = mean_MA.shape
    if len(shape) != 2 or log_std.shape != (shape[1:] if log_std.dim() == 1 else shape):
        raise InputError(
            f"mean is [M, A] and log_std [A] or [M, A]; got {tuple(shape)} and {tuple(log_std.shape)}", field="log_std"
        )
    if other_MA is not None and (other_MA.shape != shape or other_MA.dtype is not mean_MA.dtype):
        raise InputError(
            f"{name} is {other_MA.dtype} {tuple(other_MA.shape)}; expected {mean_MA.dtype} {tuple(shape)}", field=name
        )
