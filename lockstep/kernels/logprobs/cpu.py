"""Log-probabilities through the compiled kernels. The softmax is recomputed in the backward pass rather than kept.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.logprobs.naive import no_distribution


def _forward(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    num, vocab = logits.shape
    logprob = torch.empty(num)
    bad = native.lib().ls_token_logprobs(
        logits.data_ptr(), tokens.data_ptr(), temperature, logprob.data_ptr(), num, vocab
    )
    if bad >= 0:
        raise no_distribution(logits, bad)
    if bad <= -2:
        raise InputError(f"tokens[{-2 - bad}] is {int(tokens[-2 - bad])}; expected 0..{vocab - 1}", field="tokens")
    return logprob


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, tokens)
        ctx.temperature = temperature
        return _forward(logits, tokens, temperature)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        native.refuse_double_backward()
        logits, tokens = ctx.saved_tensors
        dlogprob, dlogits = native.contiguous(grads[0]), torch.empty_like(logits)
        native.lib().ls_token_logprobs_backward(
            logits.data_ptr(),
            tokens.data_ptr(),
            ctx.temperature,
            dlogprob.data_ptr(),
            dlogits.data_ptr(),
            *logits.shape,
        )
        return dlogits, None, None


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor, temperature: float) -> Tensor:
    """See `lockstep.kernels.token_logprobs`."""
    logits, tokens = native.contiguous(logits_RV), native.contiguous(tokens_R)
    if torch.is_grad_enabled() and logits.requires_grad:
        out: Tensor = _TokenLogprobs.apply(logits, tokens, temperature)  # type: ignore[no-untyped-call]
        return out
    return _forward(logits, tokens, temperature)


def top_logprobs(logits_RV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.top_logprobs`."""
    logits = native.contiguous(logits_RV)
    ids, logprob = torch.empty((len(logits), num), dtype=torch.int64), torch.empty(len(logits), num)
    bad = native.lib().ls_top_logprobs(logits.data_ptr(), num, ids.data_ptr(), logprob.data_ptr(), *logits.shape)
    if bad >= 0:
        raise no_distribution(logits, bad)
    return ids, logprob
