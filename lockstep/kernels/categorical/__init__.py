"""Categorical and multi-discrete heads: the log-probability that the sampler records is the one the learner computes.

A logit of -inf or of a large negative number masks its choice: probability 0, no contribution to the entropy.
Legend: M rows, A logits of all blocks together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.categorical import cpu, naive, opaque

IMPLEMENTATIONS = {"naive": naive, "cpu": cpu, "opaque": opaque}


def categorical_evaluate(
    logits_MA: Tensor, actions: Tensor, nvec: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of given actions, and entropy.

    Args:
        logits_MA: unnormalised log-probabilities; the blocks of a multi-discrete space lie side by side.
        actions: int64 [M], or [M, len(nvec)] with `nvec`.
        nvec: choices per block; None for one block of A.

    Returns:
        (logprob_M, entropy_M), sums over blocks, differentiable with respect to the logits.

    Raises:
        InputError: for an action out of range or shapes that do not fit.
    """
    sizes = _sizes(logits_MA, nvec)
    if actions.dtype is not torch.int64 or actions.numel() != logits_MA.shape[0] * len(sizes):
        raise InputError(
            f"actions are {actions.dtype} {tuple(actions.shape)}; expected int64 with {len(sizes)} per row of "
            f"{logits_MA.shape[0]}",
            field="actions",
        )
    out: tuple[Tensor, Tensor] = IMPLEMENTATIONS[native.choose(logits_MA)].evaluate(logits_MA, actions, sizes)
    return out


def categorical_sample(
    logits_MA: Tensor, uniform_MA: Tensor | None, nvec: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Draw by Gumbel-max from uniforms in (0, 1); `None` takes the mode.

    Returns:
        (actions int64 [M], or [M, len(nvec)] with `nvec`; logprob_M). Not differentiable.
    """
    sizes = _sizes(logits_MA, nvec)
    if uniform_MA is not None and uniform_MA.shape != logits_MA.shape:
        raise InputError(
            f"uniform is {tuple(uniform_MA.shape)}; expected {tuple(logits_MA.shape)}, one per logit", field="uniform"
        )
    with torch.no_grad():
        actions, logprob = IMPLEMENTATIONS[native.choose(logits_MA)].sample(logits_MA, uniform_MA, sizes)
    return (actions.view(-1) if nvec is None else actions), logprob


def categorical_mode(logits_MA: Tensor, nvec: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """The first most probable choice and its log-probability; see `categorical_sample`."""
    return categorical_sample(logits_MA, None, nvec)


def _sizes(logits_MA: Tensor, nvec: tuple[int, ...] | None) -> tuple[int, ...]:
    if logits_MA.dim() != 2:
        raise InputError(f"logits are [M, A]; got {tuple(logits_MA.shape)}", field="logits")
    if nvec is None:
        return (logits_MA.shape[1],)
    if sum(nvec) != logits_MA.shape[1]:
        raise InputError(f"logits have {logits_MA.shape[1]} columns; nvec {nvec} needs {sum(nvec)}", field="logits")
    return tuple(nvec)
