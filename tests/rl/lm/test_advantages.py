"""Advantages against their formulas, written out or by enumeration."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
import torch
from torch import Tensor

from lockstep.core.errors import ConfigError, InputError
from lockstep.rl.lm.advantages import (
    EPS,
    SEQUENCE_ADVANTAGES,
    Rewards,
    estimated_pass_at_k,
    sequence_advantages,
    token_gae,
    token_rewards,
    whitened_tokens,
)

REWARD = [1.0, 0.0, 0.5, 2.0, 7.0, 1.0, 1.0, 0.25]
GROUP = [4, 4, 9, 4, 1, 9, 9, 4]
"""Groups of 4, 3 and 1, in disorder."""


def advantages(kind: str, reward: list[float], group: list[int], **more: object) -> list[float]:
    rewards = Rewards(reward_N=torch.tensor(reward), group_N=torch.tensor(group), **more)  # type: ignore[arg-type]
    return sequence_advantages(kind, rewards).tolist()


def members(index: int) -> list[float]:
    return [r for r, g in zip(REWARD, GROUP, strict=True) if g == GROUP[index]]


def expected(kind: str) -> list[float]:
    out = []
    centred = [r - statistics.mean(members(i)) for i, r in enumerate(REWARD)]
    for i, r in enumerate(REWARD):
        own, mean = members(i), statistics.mean(members(i))
        alone = len(own) == 1
        match kind:
            case "group_normalised":
                out.append(0.0 if alone else (r - mean) / (statistics.stdev(own) + EPS))
            case "group_centred":
                out.append(r - mean)
            case "leave_one_out":
                out.append(0.0 if alone else r - (sum(own) - r) / (len(own) - 1))
            case "batch_whitened":
                out.append((r - statistics.mean(REWARD)) / (statistics.pstdev(REWARD) + EPS))
            case "group_batch_whitened":
                out.append((centred[i] - statistics.mean(centred)) / (statistics.pstdev(centred) + EPS))
            case "max_likelihood":
                out.append((r - mean) / mean)
    return out


@pytest.mark.parametrize(
    "kind",
    ["group_normalised", "group_centred", "leave_one_out", "batch_whitened", "group_batch_whitened", "max_likelihood"],
)
def test_closed_form(kind: str) -> None:
    assert advantages(kind, REWARD, GROUP) == pytest.approx(expected(kind), abs=1e-6)


@pytest.mark.parametrize("kind", sorted(SEQUENCE_ADVANTAGES))
def test_equal_rewards_say_nothing(kind: str) -> None:
    """0.1 is not a binary fraction: a mean of seven of them is off by rounding, which must not be divided by 1e-6."""
    if kind == "greedy_baseline":
        assert advantages(kind, [0.1] * 7, [3] * 7, baseline_N=torch.full((7,), 0.1)) == [0.0] * 7
    else:
        assert advantages(kind, [0.1] * 7, [3] * 7, k=2) == [0.0] * 7
        assert all(map(math.isfinite, advantages(kind, [0.0] * 7, [3] * 7, k=2)))


def test_remax_subtracts_the_greedy_reward() -> None:
    assert advantages("greedy_baseline", [1.0, 0.0], [0, 0], baseline_N=torch.tensor([0.25, 0.25])) == [0.75, -0.25]
    with pytest.raises(InputError, match="baseline_N"):
        advantages("greedy_baseline", [1.0], [0])


@pytest.mark.parametrize("k", [2, 3, 5])
def test_pass_at_k_is_what_subsets_say(k: int) -> None:
    rng = random.Random(k)
    for reward in ([rng.choice((0.0, 1.0)) for _ in range(6)], [rng.gauss(0, 1) for _ in range(6)]):
        found = advantages("pass_at_k", reward, [0] * 6, k=k)
        for i in range(6):
            total = 0.0
            for others in itertools.combinations([j for j in range(6) if j != i], k - 1):
                best = max(reward[j] for j in others)
                total += max(best, reward[i]) - best
            assert found[i] == pytest.approx(6 * total / math.comb(6, k), abs=1e-5)


def test_pass_at_k_of_right_or_wrong() -> None:
    found = advantages("pass_at_k", [1.0, 0.0, 1.0, 0.0, 0.0], [0] * 5, k=3)
    weight = 3 * math.comb(3, 2) / math.comb(4, 2)
    assert found == pytest.approx([weight, 0.0, weight, 0.0, 0.0], abs=1e-6)
    assert advantages("pass_at_k", REWARD, GROUP, k=1) == advantages("leave_one_out", REWARD, GROUP)
    # A group that lost samples to its verifier says nothing, and the others go on.
    assert advantages("pass_at_k", [1.0, 1.0, 0.0], [0, 1, 1], k=2)[0] == 0.0


def pass_at(p: Tensor, reward: list[float], k: int) -> Tensor:
    """E[best of k] over three arms."""
    outcomes = itertools.product(range(3), repeat=k)
    return torch.stack([p[list(arms)].prod() * max(reward[a] for a in arms) for arms in outcomes]).sum()


@pytest.mark.parametrize("kind", ["leave_one_out", "pass_at_k", "max_likelihood"])
def test_gradient_is_unbiased(kind: str) -> None:
    """Over all 3^4 outcomes of 4 samples of a three-armed bandit, the expected estimate is the objective's gradient: E[r],
    E[best of 2], and for MaxRL the sum of pass@k / k up to 3 (its baseline costs the last term)."""
    theta = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    reward = [0.0, 1.0, 1.0] if kind == "max_likelihood" else [0.0, 0.4, 1.0]
    p = theta.softmax(0)
    objective = {
        "leave_one_out": lambda: pass_at(p, reward, 1),
        "pass_at_k": lambda: pass_at(p, reward, 2),
        "max_likelihood": lambda: sum((pass_at(p, reward, k) / k for k in (2, 3)), pass_at(p, reward, 1)),
    }[kind]()
    (exact,) = torch.autograd.grad(objective, theta)
    estimate, known = torch.zeros(3, dtype=torch.float64), p.detach()
    for arms in itertools.product(range(3), repeat=4):
        weights = advantages(kind, [reward[a] for a in arms], [0] * 4, k=2)
        for arm, weight in zip(arms, weights, strict=True):
            estimate += known[list(arms)].prod() * weight / 4 * (torch.eye(3, dtype=torch.float64)[arm] - known)
    torch.testing.assert_close(estimate, exact, rtol=1e-5, atol=1e-6)


def test_pass_at_k_estimate_is_the_share_of_subsets() -> None:
    for num, right, k in ((5, 2, 3), (6, 0, 2), (4, 4, 1), (5, 3, 4)):
        subsets = list(itertools.combinations(range(num), k))
        share = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
        assert estimated_pass_at_k(num, right, k) == pytest.approx(share)
    with pytest.raises(InputError):
        estimated_pass_at_k(3, 1, 4)


def naive_gae(reward: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    out, trace = [], 0.0
    for t in reversed(range(len(reward))):
        following = value[t + 1] if t + 1 < len(value) else 0.0
        trace = reward[t] + gamma * following - value[t] + gamma * lam * trace
        out.append(trace)
    return out[::-1]


def test_token_gae_runs_over_each_sequence_apart() -> None:
    lengths, gamma, lam = [3, 1, 6, 2], 0.9, 0.7
    sequence_R = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    kl_R, value_R = torch.randn(12), torch.randn(12)
    reward_R = token_rewards(torch.tensor([1.0, -1.0, 0.5, 2.0]), sequence_R, kl_R=kl_R, kl_coef=0.1)
    assert reward_R.tolist() == pytest.approx(
        [-0.1 * float(kl) + {2: 1.0, 3: -1.0, 9: 0.5, 11: 2.0}.get(r, 0.0) for r, kl in enumerate(kl_R)]
    )
    advantage_R, return_R = token_gae(reward_R, value_R, sequence_R, gamma=gamma, lam=lam)
    parts: list[float] = []
    for reward, value in zip(reward_R.split(lengths), value_R.split(lengths), strict=True):
        parts += naive_gae(reward.tolist(), value.tolist(), gamma, lam)
    assert advantage_R.tolist() == pytest.approx(parts, abs=1e-5)
    torch.testing.assert_close(return_R, advantage_R + value_R)


def test_return_to_go_is_gae_without_values() -> None:
    reward_R, sequence_R = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 0, 1])
    assert token_gae(reward_R, torch.zeros(4), sequence_R, gamma=1.0, lam=1.0)[0].tolist() == [6.0, 5.0, 3.0, 4.0]


def test_whitened_tokens_over_all_micro_batches() -> None:
    parts: list[Tensor] = [torch.randn(5) + 3, torch.randn(9)]
    weight = [torch.rand(5), torch.rand(9)]
    found, w = torch.cat(whitened_tokens(parts, weight)), torch.cat(weight)
    assert float((found * w).sum() / w.sum()) == pytest.approx(0.0, abs=1e-6)
    assert float((found**2 * w).sum() / w.sum()) == pytest.approx(1.0, abs=1e-4)


def test_wrong_rewards_are_refused() -> None:
    with pytest.raises(InputError, match="finite"):
        advantages("group_centred", [float("nan")], [0])
    with pytest.raises(InputError, match="expected 0 or more"):
        advantages("max_likelihood", [-1.0, 1.0], [0, 0])
    with pytest.raises(ConfigError, match="did you mean 'group_centred'"):
        advantages("group_centered", [1.0], [0])
    with pytest.raises(ConfigError, match="token_gae"):
        advantages("gae", [1.0], [0])
