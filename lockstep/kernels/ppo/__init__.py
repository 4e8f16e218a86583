"""The clipped surrogate loss of PPO with its value and entropy terms. Legend: B samples."""

from __future__ import annotations

from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.ppo import cpu, naive

IMPLEMENTATIONS = {"naive": naive.surrogate, "cpu": cpu.surrogate}
STATS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "ratio_max_dev")


def ppo_surrogate(
    logprob_B: Tensor,
    entropy_B: Tensor,
    value_B: Tensor,
    old_logprob_B: Tensor,
    advantage_B: Tensor,
    return_B: Tensor,
    old_value_B: Tensor,
    clip: float,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    mask_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-E[min(r A, clip(r) A)] + value_coef * 1/2 E[(V - R)^2] - entropy_coef * E[H] (Schulman et al. 2017).

    The kernel divides by the number of unmasked samples; sums are taken in sample order.

    Args:
        clip: ratio r = exp(logprob - old_logprob) is held in 1 ± clip.
        value_clip: hold V in old_value ± value_clip and take the larger error; None: plain.
        mask_B: bool, False leaves a sample out of every mean and gives it no gradient.

    Returns:
        (loss scalar, differentiable with respect to logprob, entropy and value;
        stats [6]: policy_loss, value_loss, entropy, approx_kl (k3 estimator of Schulman 2020), clip_fraction,
        ratio_max_dev = max |r - 1|).
    """
    tensors = (logprob_B, entropy_B, value_B, old_logprob_B, advantage_B, return_B, old_value_B)
    for tensor in tensors:
        if tensor.shape != logprob_B.shape or tensor.dim() != 1 or tensor.dtype is not logprob_B.dtype:
            raise InputError(
                f"all inputs are [B] of one dtype; got {[(tuple(t.shape), t.dtype) for t in tensors]}", field="logprob"
            )
    if mask_B is not None and mask_B.shape != logprob_B.shape:
        raise InputError(f"mask is {tuple(mask_B.shape)}; expected {tuple(logprob_B.shape)}", field="mask")
    return IMPLEMENTATIONS[native.choose(logprob_B)](
        *tensors, clip, value_clip, value_coef, entropy_coef, None if mask_B is None else mask_B.bool()
    )
