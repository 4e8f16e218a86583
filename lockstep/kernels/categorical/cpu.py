"""Categorical head through the compiled kernels.

Legend: M rows, A logits of all blocks together.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native


@lru_cache(maxsize=256)
def _sizes_array(sizes: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(sizes))(*sizes)


def _evaluate(logits: Tensor, actions: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    num = logits.shape[0]
    logprob, entropy = torch.empty(num, dtype=torch.float32), torch.empty(num, dtype=torch.float32)
    bad = native.lib().ls_categorical_evaluate(
        logits.data_ptr(),
        actions.data_ptr(),
        logprob.data_ptr(),
        entropy.data_ptr(),
        num,
        _sizes_array(sizes),
        len(sizes),
    )
    if bad >= 0:
        raise InputError(
            f"actions[{bad}] is {actions.view(num, -1)[bad].tolist()}; expected 0 <= action < {list(sizes)}",
            field="actions",
        )
    return logprob, entropy


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, actions: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        out = _evaluate(logits, actions, sizes)
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, actions)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        native.refuse_double_backward()
        logits, actions = ctx.saved_tensors
        dlogprob, dentropy = (None if g is None else native.contiguous(g) for g in grads)
        dlogits = torch.empty_like(logits)
        native.lib().ls_categorical_backward(
            logits.data_ptr(),
            actions.data_ptr(),
            None if dlogprob is None else dlogprob.data_ptr(),
            None if dentropy is None else dentropy.data_ptr(),
            dlogits.data_ptr(),
            logits.shape[0],
            _sizes_array(ctx.sizes),
            len(ctx.sizes),
        )
        return dlogits, None, None


def evaluate(logits_MA: Tensor, actions: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(logprob_M, entropy_M), summed over blocks."""
    logits, actions = native.contiguous(logits_MA), native.contiguous(actions)
    if torch.is_grad_enabled() and logits.requires_grad:
        out: tuple[Tensor, Tensor] = _Evaluate.apply(logits, actions, sizes)  # type: ignore[no-untyped-call]
        return out
    return _evaluate(logits, actions, sizes)


@torch.no_grad()
def sample(logits_MA: Tensor, uniform_MA: Tensor | None, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(actions [M, blocks], logprob_M) by Gumbel-max; no uniforms: the mode."""
    logits = native.contiguous(logits_MA)
    uniform = None if uniform_MA is None else native.contiguous(uniform_MA)
    num = logits.shape[0]
    actions = torch.empty((num, len(sizes)), dtype=torch.int64)
    logprob = torch.empty(num, dtype=torch.float32)
    native.lib().ls_categorical_sample(
        logits.data_ptr(),
        None if uniform is None else uniform.data_ptr(),
        actions.data_ptr(),
        logprob.data_ptr(),
        num,
        _sizes_array(sizes),
        len(sizes),
    )
    return actions, logprob
