"""Drawing the next token. A row's outcome depends on its logits, its wishes, its seed and its position only.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels.sampling import naive

_SEED_MASK = (1 << 64) - 1


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
        InputError: shapes or dtypes that do not fit, or a row whose largest logit is not finite (all banned, +inf, NaN).
    """
    if logits_RV.dim() != 2 or logits_RV.dtype is not torch.float32:
        raise InputError(
            f"logits are {logits_RV.dtype} {tuple(logits_RV.shape)}; expected float32 [R, V]", field="logits"
        )
    floats = {"temperature": temperature_R, "top_p": top_p_R, "min_p": min_p_R, "typical_p": typical_p_R}
    for name, tensor in floats.items():
        _check(name, tensor, torch.float32, logits_RV)
    for name, tensor in {"top_k": top_k_R, "seeds": seeds_R, "positions": positions_R}.items():
        _check(name, tensor, torch.int64, logits_RV)
    columns = (temperature_R, top_k_R, top_p_R, min_p_R, typical_p_R, seeds_R, positions_R)
    rules = [
        naive.Rule(t, k, p, m, y, seed & _SEED_MASK, position)
        for t, k, p, m, y, seed, position in zip(*(column.tolist() for column in columns), strict=True)
    ]
    return naive.sample_tokens(logits_RV, rules)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, logits_RV: Tensor) -> None:
    if tensor.dtype is not dtype or tensor.shape != logits_RV.shape[:1]:
        raise InputError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} [{logits_RV.shape[0]}]", field=name
        )
