"""PPO loss through the compiled kernel: the gradient is computed with the loss. Legend: B samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.kernels import native


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprob: Tensor,
        entropy: Tensor,
        value: Tensor,
        constants: tuple[Tensor, ...],
        mask: Tensor | None,
        scalars: tuple[float, ...],
    ) -> tuple[Tensor, Tensor]:
        num = logprob.shape[0]
        loss, stats = torch.empty((), dtype=torch.float32), torch.empty(6, dtype=torch.float32)
        stored = torch.empty((3, num), dtype=torch.float32)
        base = stored.data_ptr()
        native.lib().ls_ppo_surrogate(
            logprob.data_ptr(),
            entropy.data_ptr(),
            value.data_ptr(),
            *[t.data_ptr() for t in constants],
            None if mask is None else mask.data_ptr(),
            *scalars,
            num,
            loss.data_ptr(),
            stats.data_ptr(),
            base,
            base + 4 * num,
            base + 8 * num,
        )
        ctx.save_for_backward(stored)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        native.refuse_double_backward()
        (stored,) = ctx.saved_tensors
        dlogprob, dentropy, dvalue = (stored * grads[0]).unbind(0)
        return dlogprob, dentropy, dvalue, None, None, None


def surrogate(
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
    mask_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.ppo_surrogate`."""
    constants = tuple(native.contiguous(t) for t in (old_logprob_B, advantage_B, return_B, old_value_B))
    mask = None if mask_B is None else native.contiguous(mask_B)
    scalars = (clip, -1.0 if value_clip is None else value_clip, value_coef, entropy_coef)
    out: tuple[Tensor, Tensor] = _Surrogate.apply(  # type: ignore[no-untyped-call]
        native.contiguous(logprob_B),
        native.contiguous(entropy_B),
        native.contiguous(value_B),
        constants,
        mask,
        scalars,
    )
    return out
