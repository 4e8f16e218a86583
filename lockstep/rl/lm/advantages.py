"""How good each sample was, compared with what: rewards in, advantages out. None of it is differentiable.

The samples of one problem are a group; groups may have different sizes, because a sample whose verifier failed has no
reward and is left out. Where a group says nothing (one sample, or all rewards equal) its advantages are 0.

Legend: N samples of a batch, R sampled tokens (rows) of a micro-batch, S sequences of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError, InputError, unknown_name

EPS = 1e-6
"""Added to deviations before they divide."""

Advantage = Literal[
    "group_normalised",
    "group_centred",
    "leave_one_out",
    "batch_whitened",
    "group_batch_whitened",
    "greedy_baseline",
    "max_likelihood",
    "pass_at_k",
    "gae",
    "none",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rewards:
    """What the samples of one batch got."""

    reward_N: Tensor
    """float32."""
    group_N: Tensor
    """int64: which problem, any numbers."""
    baseline_N: Tensor | None = None
    """float32: reward of the greedy answer to the same problem, which ReMax subtracts."""
    k: int = 1
    """Samples of which the best counts, for pass_at_k."""

    def __post_init__(self) -> None:
        shape = self.reward_N.shape
        if self.reward_N.dim() != 1 or self.group_N.dtype is not torch.int64 or self.group_N.shape != shape:
            raise InputError(
                f"rewards are {list(shape)}, groups {self.group_N.dtype} {list(self.group_N.shape)}; expected [N] and "
                "int64 [N]",
                field="group",
            )
        if not bool(torch.isfinite(self.reward_N).all()):
            raise InputError("rewards are not all finite; a sample without a score must be left out", field="reward")


def group_normalised(rewards: Rewards) -> Tensor:
    """(r − mean) / (std + ε) within the group, std with n − 1 (GRPO, Shao et al. 2024, section 4.1.2)."""
    groups = _Groups(rewards)
    centred_N = groups.centred(groups.reward_N)
    squares_G = groups.sum(centred_N**2)
    std_N = (squares_G / (groups.num_G - 1).clamp(min=1)).sqrt()[groups.index_N]
    return (centred_N / (std_N + EPS)).float()


def group_centred(rewards: Rewards) -> Tensor:
    """r − mean of the group (Dr.GRPO, Liu et al. 2025: dividing by the deviation favours problems that are too easy or too
    hard)."""
    groups = _Groups(rewards)
    return groups.centred(groups.reward_N).float()


def leave_one_out(rewards: Rewards) -> Tensor:
    """r − mean of the group's others (RLOO, Ahmadian et al. 2024, eq. 4): n / (n − 1) (r − mean)."""
    groups = _Groups(rewards)
    num_N = groups.num_G[groups.index_N]
    return (groups.centred(groups.reward_N) * num_N / (num_N - 1).clamp(min=1)).float()


def batch_whitened(rewards: Rewards) -> Tensor:
    """(r − mean) / (std + ε) over the whole batch (REINFORCE++, Hu et al. 2025, eq. 7)."""
    return _whitened(rewards.reward_N.double()).float()


def group_batch_whitened(rewards: Rewards) -> Tensor:
    """r − mean of the group, whitened over the whole batch (REINFORCE++-baseline, Hu et al. 2025)."""
    groups = _Groups(rewards)
    return _whitened(groups.centred(groups.reward_N)).float()


def greedy_baseline(rewards: Rewards) -> Tensor:
    """r − reward of the greedy answer to the same problem (ReMax, Li et al. 2024, eq. 6).

    Raises:
        InputError: no baselines.
    """
    if rewards.baseline_N is None:
        raise InputError(
            "greedy_baseline needs baseline_N, the reward of each problem's greedy answer", field="baseline"
        )
    return (rewards.reward_N.double() - rewards.baseline_N.double()).float()


def max_likelihood(rewards: Rewards) -> Tensor:
    """(r − mean) / mean within the group (MaxRL, Tajwar et al. 2026): unbiased for the gradient of Σ_{k < n} pass@k / k, the
    first terms of the series of log p, rather than of p. A group whose mean is 0 has advantage 0.

    Raises:
        InputError: a negative reward; the method is for right-or-wrong rewards in [0, 1].
    """
    if len(rewards.reward_N) and float(rewards.reward_N.min()) < 0.0:
        raise InputError(
            f"max_likelihood got the reward {float(rewards.reward_N.min())}; expected 0 or more", field="reward"
        )
    groups = _Groups(rewards)
    mean_N = (groups.sum(groups.reward_N) / groups.num_G)[groups.index_N]
    return torch.where(mean_N > 0, groups.centred(groups.reward_N) / mean_N.clamp(min=1e-30), 0.0).float()


def pass_at_k(rewards: Rewards) -> Tensor:
    """What a sample adds to the best of k (PKPO, Walder & Karkhanis 2025, eq. 33): n / C(n, k) times the sum,
    over the subsets of k of its group that hold it, of (best of the subset − best of the others in it).

    The mean over samples of advantage · ∇log π is unbiased for ∇E[max of k rewards]. For right-or-wrong rewards with c right
    of n it is k C(n − c, k − 1) / C(n − 1, k − 1) for the right ones and 0 for the others. With k = 1 it is `leave_one_out`.
    A group of fewer than k samples has advantages 0.

    Raises:
        ConfigError: k below 1.
    """
    k, out_N = rewards.k, torch.zeros(len(rewards.reward_N), dtype=torch.float64)
    if k < 1:
        raise ConfigError(f"k={k}; expected 1 or more")
    if k == 1:
        return leave_one_out(rewards)
    for group in rewards.group_N.unique().tolist():
        place = (rewards.group_N == group).nonzero().squeeze(1)
        reward, num = rewards.reward_N[place].double(), len(place)
        if num < k:
            continue  # samples whose verifier failed are not here: there is no best of k
        order = torch.argsort(reward, stable=True)
        ranked = reward[order]
        # Of the subsets that hold i as their best, the second best is j in C(j, k - 2) of them, j counted from the worst.
        share = [num * math.comb(j, k - 2) / math.comb(num, k) for j in range(num)]
        runner_up = torch.tensor(share, dtype=torch.float64)
        mass, weighted = runner_up.cumsum(0) - runner_up, (runner_up * ranked).cumsum(0) - runner_up * ranked
        out_N[place[order]] = ranked * mass - weighted
    return out_N.float()


def none(rewards: Rewards) -> Tensor:
    """0: rewards are shown, and teach nothing (on-policy distillation)."""
    return torch.zeros_like(rewards.reward_N)


SEQUENCE_ADVANTAGES: dict[str, Callable[[Rewards], Tensor]] = {
    "group_normalised": group_normalised,
    "group_centred": group_centred,
    "leave_one_out": leave_one_out,
    "batch_whitened": batch_whitened,
    "group_batch_whitened": group_batch_whitened,
    "greedy_baseline": greedy_baseline,
    "max_likelihood": max_likelihood,
    "pass_at_k": pass_at_k,
    "none": none,
}
"""Advantages that are one number a sample. "gae" is a number a token: `token_gae`."""


def sequence_advantages(kind: str, rewards: Rewards) -> Tensor:
    """Advantages [N] float32 by name.

    Raises:
        ConfigError: unknown name, or "gae", which needs values.
    """
    if kind not in SEQUENCE_ADVANTAGES:
        hint = "; gae is computed by token_gae from a value head" if kind in get_args(Advantage) else ""
        raise ConfigError(unknown_name("advantage", kind, SEQUENCE_ADVANTAGES) + hint)
    return SEQUENCE_ADVANTAGES[kind](rewards)


def token_gae(
    reward_R: Tensor, value_R: Tensor, sequence_R: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the sampled tokens of each sequence (Schulman et al. 2016, eq. 16).

    A step is a token that the model chose; what others wrote in between passes without discount. After the last one the
    value is 0.

    Args:
        reward_R: of each token; see `token_rewards`.
        value_R: of the prefix that each token was chosen after.
        sequence_R: int64, rising: `MicroBatch.sequence_R`.

    Returns:
        (advantage_R, return_R = advantage_R + value_R).
    """
    if len(reward_R) == 0:
        return reward_R.clone(), value_R.clone()
    counts_S = torch.bincount(sequence_R)
    starts_S = counts_S.cumsum(0) - counts_S
    step_R = torch.arange(len(sequence_R), device=sequence_R.device) - starts_S[sequence_R]
    shape = int(counts_S.max()), len(counts_S)

    def spread(values_R: Tensor) -> Tensor:
        return values_R.new_zeros(shape).index_put((step_R, sequence_R), values_R.detach())

    is_last_R = step_R == counts_S[sequence_R] - 1
    next_R = torch.where(is_last_R, 0.0, value_R.detach().roll(-1))
    # A sequence ends at its last row; the empty cells below it are not steps.
    is_last_TS = spread(is_last_R.float()).bool()
    advantage_TS = kernels.gae(
        spread(reward_R),
        spread(value_R),
        spread(next_R),
        is_last_TS,
        is_last_TS,
        spread(torch.ones_like(reward_R)).bool(),
        gamma,
        lam,
    )
    advantage_R = advantage_TS[step_R, sequence_R]
    return advantage_R, advantage_R + value_R.detach()


def token_rewards(score_S: Tensor, sequence_R: Tensor, *, kl_R: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """Reward of each token: the score at the last one, and −kl_coef · kl at every one (Ouyang et al. 2022).

    With γ = λ = 1 and values of 0, `token_gae` makes of it the return to go that REINFORCE++ starts from.
    """
    reward_R = torch.zeros_like(sequence_R, dtype=torch.float32) if kl_R is None else -kl_coef * kl_R.detach()
    is_last_R = torch.ones_like(sequence_R, dtype=torch.bool)
    is_last_R[:-1] = sequence_R[1:] != sequence_R[:-1]
    return reward_R + torch.where(is_last_R, score_S[sequence_R], 0.0)


def whitened_tokens(advantage: Sequence[Tensor], weight: Sequence[Tensor]) -> list[Tensor]:
    """Token advantages with weighted mean 0 and deviation 1 over all micro-batches, as PPO has them."""
    all_R, weight_R = torch.cat(list(advantage)).double(), torch.cat(list(weight)).double()
    total = weight_R.sum()
    mean = (all_R * weight_R).sum() / total
    std = (((all_R - mean) ** 2 * weight_R).sum() / total).sqrt()
    return [((one.double() - mean) / (std + EPS)).float() for one in advantage]


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13): 0 up to max − buffer, then linear to −1 at max.

    >>> [overlong_penalty(n, 100, 20) for n in (80, 90, 100, 130)]
    [0.0, -0.5, -1.0, -1.0]
    """
    if not 0 < buffer <= max_tokens:
        raise ConfigError(f"overlong buffer={buffer} of max_tokens={max_tokens}; expected 0 < buffer <= max_tokens")
    return -min(max(num_tokens - (max_tokens - buffer), 0) / buffer, 1.0) + 0.0


def estimated_pass_at_k(num: int, num_right: int, k: int) -> float:
    """Unbiased estimate of pass@k from `num` samples (Chen et al. 2021, eq. 1): 1 − C(n − c, k) / C(n, k).

    >>> estimated_pass_at_k(4, 1, 2)
    0.5

    Raises:
        InputError: k outside 1..num, or num_right outside 0..num.
    """
    if not 1 <= k <= num or not 0 <= num_right <= num:
        raise InputError(f"pass@{k} of {num_right} right in {num}; expected 1 <= k <= num and 0 <= right <= num")
    return 1.0 - math.comb(num - num_right, k) / math.comb(num, k)


class _Groups:
    """Sums by group, in float64."""

    def __init__(self, rewards: Rewards) -> None:
        self.reward_N = rewards.reward_N.double()
        groups, self.index_N = rewards.group_N.unique(return_inverse=True)
        self._size = len(groups)
        self.num_G = self.sum(torch.ones_like(self.reward_N))

    def sum(self, values_N: Tensor) -> Tensor:
        return values_N.new_zeros(self._size).index_add(0, self.index_N, values_N)

    def centred(self, values_N: Tensor) -> Tensor:
        centred_N = values_N - (self.sum(values_N) / self.num_G)[self.index_N]
        # Equal rewards are centred at 0 exactly, not at what rounding left, which a small deviation would blow up.
        low_N, high_N = (self._bound(values_N, amax) for amax in (False, True))
        return torch.where(low_N == high_N, 0.0, centred_N)

    def _bound(self, values_N: Tensor, is_max: bool) -> Tensor:
        start = values_N.new_full((self._size,), -math.inf if is_max else math.inf)
        mode = "amax" if is_max else "amin"
        return start.scatter_reduce(0, self.index_N, values_N, mode)[self.index_N]


def _whitened(values_N: Tensor) -> Tensor:
    if len(values_N) < 2 or bool((values_N == values_N[0]).all()):
        return torch.zeros_like(values_N)
    return (values_N - values_N.mean()) / (values_N.std(correction=0) + EPS)
