"""Drawing the next token. A row's outcome depends on its logits, its wishes, its seed and its position only.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.sampling import cpu, naive

_NAMES = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seeds", "positions")
_DTYPES = (torch.float32, torch.int64, torch.float32, torch.float32, torch.float32, torch.int64, torch.int64)
IMPLEMENTATIONS = {"naive": naive, "cpu": cpu, "opaque": naive}


@torch.no_grad()
def sample_tokens(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    typical_p_R: Tensor,
    seeds_R: Tensor,
    positions_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Divide by the temperature, keep the tokens that pass the filters, draw one by Gumbel-max.

    The filters act one after another, each on the renormalised probabilities that the one before left, with tokens in
    the order of falling logits and, among equals, rising ids: the `top_k` first; the smallest prefix whose mass reaches
    `top_p`; those of at least `min_p` times the largest probability; the smallest set of the most typical ones (by the
    distance of −log p from the entropy, Meister et al. 2023) whose mass reaches `typical_p`. The noise of a token is keyed
    by (seed, position, token), so that filters do not change it.

    Args:
        logits_RV: float32; -inf bans a token.
        temperature_R: float32; 0 takes the largest logit, the lowest id among equals, and ignores the rest.
        top_k_R: int64; 0: all.
        top_p_R, min_p_R, typical_p_R: float32; 1, 0 and 1 keep all.
        seeds_R: int64, taken modulo 2^64.
        positions_R: int64 from 0, modulo 2^48: of the token in its sequence.

    Returns:
        (token_R int64, sampling_logprob_R float32). The latter is the log-probability within the kept tokens; without
        filters it has the bits of `token_logprobs(logits, token, temperature)`, and for temperature 0 it is 0.

    Raises:
        InputError: shapes or dtypes that do not fit, a temperature below 0 or not finite, or a row whose largest logit is
            not finite (all banned, +inf, NaN).
    """
    if logits_RV.dim() != 2 or logits_RV.dtype is not torch.float32:
        raise InputError(
            f"logits are {logits_RV.dtype} {tuple(logits_RV.shape)}; expected float32 [R, V]", field="logits"
        )
    columns = (temperature_R, top_k_R, top_p_R, min_p_R, typical_p_R, seeds_R, positions_R)
    num = logits_RV.shape[:1]
    for name, dtype, column in zip(_NAMES, _DTYPES, columns, strict=True):
        if column.dtype is not dtype or column.shape != num:
            raise InputError(f"{name} is {column.dtype} {tuple(column.shape)}; expected {dtype} [{num[0]}]", field=name)
    return IMPLEMENTATIONS[native.choose(logits_RV)].sample_tokens(logits_RV, columns)


@torch.no_grad()
def score_tokens(
    logits_RV: Tensor,
    tokens_R: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    typical_p_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `sample_tokens` reports when it draws these tokens, bit for bit, whoever drew them.

    A token that the filters would have left out (drawn from other weights' logits) is counted among the kept ones, so that
    its log-probability is finite.

    Args:
        tokens_R: int64, below V.
        temperature_R: float32 above 0. The rest as in `sample_tokens`.

    Returns:
        (sampling_logprob_R float32, kept_RV bool: the tokens it is normalised over).

    Raises:
        InputError: as `sample_tokens`, or a token outside the vocabulary.
    """
    columns = (temperature_R, top_k_R, top_p_R, min_p_R, typical_p_R)
    num = logits_RV.shape[:1]
    if logits_RV.dim() != 2 or logits_RV.dtype is not torch.float32 or tokens_R.shape != num:
        raise InputError(
            f"logits are {logits_RV.dtype} {tuple(logits_RV.shape)}, tokens {tuple(tokens_R.shape)}; expected float32 "
            "[R, V] and [R]",
            field="logits",
        )
    for name, dtype, column in zip(("tokens", *_NAMES), (torch.int64, *_DTYPES), (tokens_R, *columns), strict=False):
        if column.dtype is not dtype or column.shape != num:
            raise InputError(f"{name} is {column.dtype} {tuple(column.shape)}; expected {dtype} [{num[0]}]", field=name)
    return IMPLEMENTATIONS[native.choose(logits_RV)].score_tokens(logits_RV, tokens_R, columns)
