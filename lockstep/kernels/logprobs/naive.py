"""Reference log-probabilities in plain torch: a maximum and a sum for every BLOCK columns, joined in float64.

Legend: R rows, V vocabulary, B blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lockstep.core.errors import InputError
from lockstep.kernels.folding import fold_sum

BLOCK = 1024
"""Columns per partial sum, from column 0: the parts of a vocabulary may be computed one after another."""


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature."""
    return logits if temperature == 1.0 else logits / temperature


def no_distribution(logits_RV: Tensor, row: int) -> InputError:
    """For a row that cannot be normalised."""
    return InputError(
        f"the largest of logits[{row}] is {float(logits_RV[row].amax())}; expected a finite number: a row without a "
        "token that is allowed, or a model that diverged",
        field="logits",
    )


def log_sum_exp(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum_R, float64 log_R of the sum of exp(logit − maximum)).

    Raises:
        InputError: a row without a finite maximum, or with a NaN.
    """
    top = logits_RV.detach().amax(1)
    bad = ~torch.isfinite(top)
    if bad.any():
        raise no_distribution(logits_RV, int(bad.to(torch.int64).argmax()))
    missing = -logits_RV.shape[1] % BLOCK
    blocks = functional.pad(logits_RV, (0, missing), value=-torch.inf).view(len(logits_RV), -1, BLOCK)
    peak = blocks.detach().amax(2).clamp(min=-3e38)
    partial = fold_sum((blocks - peak.unsqueeze(2)).exp()).double()
    total = fold_sum(partial * (peak - top.unsqueeze(1)).exp().double())
    return top, total.log()


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor, temperature: float) -> Tensor:
    """Log-probability of one token in each row."""
    check_ids(logits_RV, tokens_R)
    logits = scaled(logits_RV, temperature)
    top, log_total = log_sum_exp(logits)
    chosen = logits.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    return ((chosen - top).double() - log_total).to(logits.dtype)


def check_ids(logits_RV: Tensor, tokens_R: Tensor) -> None:
    """Raises InputError for a token that no column stands for."""
    bad = (tokens_R < 0) | (tokens_R >= logits_RV.shape[1])
    if bad.any():
        row = int(bad.to(torch.int64).argmax())
        raise InputError(f"tokens[{row}] is {int(tokens_R[row])}; expected 0..{logits_RV.shape[1] - 1}", field="tokens")


def top_logprobs(logits_RV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """(ids [R, num], log-probabilities), falling; equal ones by rising id."""
    top, log_total = log_sum_exp(logits_RV)
    values, ids = logits_RV.sort(dim=1, descending=True, stable=True)
    values, ids = values[:, :num], ids[:, :num]
    return ids, ((values - top.unsqueeze(1)).double() - log_total.unsqueeze(1)).to(logits_RV.dtype)
