"""Log-probabilities of tokens: the number the sampler records is, bit for bit, the one the trainer computes.

A row's bits depend on that row only. A logit of -inf bans its token: probability 0.
Legend: R rows, E model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.gpu import Later
from lockstep.kernels.logprobs import cpu, naive
from lockstep.kernels.logprobs.head import HeadLogprobs, entropy, soft_cap

__all__ = ["entropy", "head_logprobs", "head_logprobs_and_entropy", "soft_cap", "token_logprobs", "top_logprobs"]

IMPLEMENTATIONS: dict[str, Any] = {
    "naive": naive,
    "cpu": cpu,
    "opaque": naive,
    "triton": Later("lockstep.kernels.logprobs.triton"),
}


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at one token of each row.

    Args:
        tokens_R: int64, below V.

    Returns:
        [R], accurate to about 1e-6 for any V, differentiable with respect to the logits.

    Raises:
        InputError: shapes that do not fit, a token outside the vocabulary, a temperature that is not above 0, or a row
            whose maximum is not finite (all banned, +inf or NaN).
    """
    if logits_RV.dim() != 2 or tokens_R.dtype is not torch.int64 or tokens_R.shape != logits_RV.shape[:1]:
        raise InputError(
            f"logits are {tuple(logits_RV.shape)}, tokens {tokens_R.dtype} {tuple(tokens_R.shape)}; expected [R, V] and "
            "int64 [R]",
            field="tokens",
        )
    if not 0.0 < temperature < math.inf:
        raise InputError(f"temperature={temperature}; expected a finite number above 0", field="temperature")
    return IMPLEMENTATIONS[native.choose(logits_RV, has_triton=True)].token_logprobs(logits_RV, tokens_R, temperature)


@torch.no_grad()
def top_logprobs(logits_RV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` most probable tokens of each row.

    Returns:
        (ids [R, num] int64, logprobs [R, num]), falling; equal ones by rising id. Not differentiable.

    Raises:
        InputError: num outside 1..V, or a row whose maximum is not finite.
    """
    if logits_RV.dim() != 2 or not 1 <= num <= logits_RV.shape[1]:
        raise InputError(
            f"num={num} of logits {tuple(logits_RV.shape)}; expected [R, V] and 1 <= num <= V", field="num"
        )
    return IMPLEMENTATIONS[native.choose(logits_RV, has_triton=True)].top_logprobs(logits_RV, num)


def head_logprobs(
    hidden_RE: Tensor,
    weight_VE: Tensor,
    tokens_R: Tensor,
    matmul: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """`token_logprobs(soft_cap(matmul(hidden), softcap), tokens, temperature)` without ever holding [R, V].

    Args:
        weight_VE: the head's weight; the backward pass recomputes logits and multiplies by it, and gives it a gradient if
            it requires one.
        tokens_R: int64, below V.
        matmul: hidden [r, E] -> logits [r, V] with the bits that are sampled from, a row at a time independent of the
            others; called without autograd.
        softcap: of the final logits, as Gemma 2 has it; 0: none.

    Returns:
        [R], the bits of the expression above; differentiable with respect to hidden and weight.

    Raises:
        InputError: as `token_logprobs`, or a matmul whose result has another shape.
    """
    _check_head(hidden_RE, weight_VE, tokens_R)
    out: tuple[Tensor, Tensor] = HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_RE, weight_VE, tokens_R, matmul, token_logprobs, temperature, softcap, False
    )
    return out[0]


def head_logprobs_and_entropy(
    hidden_RE: Tensor,
    weight_VE: Tensor,
    tokens_R: Tensor,
    matmul: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`head_logprobs`, and the entropy [R] of the same distributions from the same pass, differentiable too."""
    _check_head(hidden_RE, weight_VE, tokens_R)
    out: tuple[Tensor, Tensor] = HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_RE, weight_VE, tokens_R, matmul, token_logprobs, temperature, softcap, True
    )
    return out


def _check_head(hidden_RE: Tensor, weight_VE: Tensor, tokens_R: Tensor) -> None:
    if hidden_RE.dim() != 2 or hidden_RE.shape[1:] != weight_VE.shape[1:] or tokens_R.shape != hidden_RE.shape[:1]:
        raise InputError(
            f"hidden is {tuple(hidden_RE.shape)}, weight {tuple(weight_VE.shape)}, tokens {tuple(tokens_R.shape)}; "
            "expected [R, E], [V, E] and [R]",
            field="hidden",
        )
