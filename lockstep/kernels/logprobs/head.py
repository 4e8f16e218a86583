"""Log-probabilities straight from hidden states: logits exist for a chunk of rows or of the vocabulary at a time only.

Legend: R rows, E model width, V vocabulary, r and v rows and columns of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import InputError

FORWARD_ROWS = 64
BACKWARD_ROWS, BACKWARD_COLUMNS = 512, 8192

TokenLogprobs = Callable[[Tensor, Tensor, float], Tensor]


def soft_cap(logits: Tensor, softcap: float) -> Tensor:
    """softcap · tanh(logits / softcap), elementwise; 0: the logits themselves."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class HeadLogprobs(torch.autograd.Function):
    """Forward by the caller's matmul, in chunks of rows; backward recomputes the logits in chunks of both."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        matmul: Callable[[Tensor], Tensor],
        token_logprobs: TokenLogprobs,
        temperature: float,
        softcap: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, chosen, entropies = [], [], []
        for rows, ids in zip(hidden.split(FORWARD_ROWS), tokens.split(FORWARD_ROWS), strict=True):
            logits = matmul(rows)
            if logits.shape != (len(rows), weight.shape[0]):
                raise InputError(
                    f"the head made {tuple(logits.shape)} of {len(rows)} rows; expected {(len(rows), weight.shape[0])}",
                    field="matmul",
                )
            logits = soft_cap(logits, softcap)
            logprobs.append(token_logprobs(logits, ids, temperature))
            chosen.append(logits.gather(1, ids.unsqueeze(1)).squeeze(1) / temperature)
            if with_entropy:
                entropies.append(entropy(logits, temperature))
        out = torch.cat(logprobs)
        entropy_R = torch.cat(entropies) if with_entropy else out.new_zeros(0)
        ctx.save_for_backward(hidden, weight, tokens, torch.cat(chosen) - out, entropy_R)
        ctx.facts = temperature, softcap
        ctx.with_entropy = with_entropy
        return out, entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, log_total, entropy_R = ctx.saved_tensors
        dhidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=hidden.dtype) if ctx.needs_input_grad[1] else None
        for r in range(0, len(hidden), BACKWARD_ROWS):
            rows = slice(r, r + BACKWARD_ROWS)
            for first in range(0, len(weight), BACKWARD_COLUMNS):
                columns = slice(first, first + BACKWARD_COLUMNS)
                part = weight[columns].to(hidden.dtype)
                raw = hidden[rows] @ part.T
                of_entropy = (grads[1][rows], entropy_R[rows]) if ctx.with_entropy else None
                facts = log_total[rows], grads[0][rows], *ctx.facts, of_entropy
                dlogits = _dlogits(raw, tokens[rows] - first, *facts)
                if dhidden is not None:
                    dhidden[rows] += dlogits @ part
                if dweight is not None:
                    dweight[columns] += dlogits.T @ hidden[rows]
        return dhidden, None if dweight is None else dweight.to(weight.dtype), *[None] * 6


def entropy(logits_RV: Tensor, temperature: float) -> Tensor:
    """−Σ p log p of softmax(logits / temperature), [R]; a banned token adds nothing."""
    logprob_RV = (logits_RV / temperature).log_softmax(1)
    return -(logprob_RV.exp() * logprob_RV.clamp(min=-3e38)).sum(1)


def _dlogits(
    raw_rv: Tensor,
    ids_r: Tensor,
    log_total_r: Tensor,
    grad_r: Tensor,
    temperature: float,
    softcap: float,
    of_entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """grad · (1[token] − p) / temperature, and of the entropy H: grad · −p (log p + H) / temperature; through the soft cap.
    Ids outside the chunk are in another one."""
    capped = soft_cap(raw_rv, softcap)
    logprob = capped / temperature - log_total_r.unsqueeze(1)
    if of_entropy is None:
        d = logprob.exp_().mul_(-grad_r.unsqueeze(1))
    else:
        grad_entropy_r, entropy_r = of_entropy
        p = logprob.exp()
        surprise = (logprob.clamp_(min=-3e38) + entropy_r.unsqueeze(1)).mul_(grad_entropy_r.unsqueeze(1))
        d = p.mul_(surprise.add_(grad_r.unsqueeze(1)).neg_())
    here = ((ids_r >= 0) & (ids_r < raw_rv.shape[1])).nonzero().squeeze(1)
    d[here, ids_r[here]] += grad_r[here]
    d /= temperature
    return d * (1.0 - (capped / softcap) ** 2) if softcap else d
