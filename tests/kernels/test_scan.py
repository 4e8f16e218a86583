"""Recurrences over time: fast against naive, and against worked examples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import InputError


def rollout(num_steps: int, num: int) -> tuple[list[Tensor], list[Tensor]]:
    floats = [torch.randn(num_steps, num) for _ in range(4)]
    terminated = torch.rand(num_steps, num) < 0.1
    ended = terminated | (torch.rand(num_steps, num) < 0.1)
    valid = torch.ones(num_steps, num, dtype=torch.bool)
    valid[1:] = ~ended[:-1]
    return floats, [terminated & valid, ended & valid, valid]


@pytest.mark.parametrize("num_steps", [1, 2, 63, 128])
@pytest.mark.parametrize("num", [1, 2, 17])
def test_fast_equals_naive(num_steps: int, num: int) -> None:
    (a, b, c, d), (terminated, ended, valid) = rollout(num_steps, num)
    results = []
    for mode in ("auto", "naive"):
        with kernels.force(mode):
            results.append(
                [
                    kernels.gae(a, b, c, terminated, ended, valid, 0.99, 0.95),
                    kernels.gae(a, b, c, terminated, ended, None, 0.99, 0.95),
                    *kernels.discounted_return(a, ended, b[0], 0.9),
                    *kernels.vtrace(d, a, b, c, terminated, ended, valid, 0.99, 0.9, 1.0, 0.8),
                ]
            )
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_gae_by_hand(mode: str) -> None:
    """Two steps, then a truncation whose bootstrap counts, a dummy row, and a termination whose bootstrap does not."""
    column = lambda *v: torch.tensor(v).view(-1, 1)  # noqa: E731
    reward, value = column(1.0, 2.0, 9.0, 4.0), column(0.5, 0.25, 7.0, 1.0)
    next_value = column(0.25, 3.0, 7.0, 100.0)
    ended, terminated = column(False, True, False, True), column(False, False, False, True)
    valid = column(True, True, False, True)
    with kernels.force(mode):
        advantage = kernels.gae(reward, value, next_value, terminated, ended, valid, 0.5, 0.5).view(-1)
    last, second = 4.0 - 1.0, 2.0 + 0.5 * 3.0 - 0.25
    assert advantage.tolist() == [1.0 + 0.5 * 0.25 - 0.5 + 0.25 * second, second, 0.0, last]


def test_vtrace_on_policy_is_gae() -> None:
    (a, b, c, _), (terminated, ended, valid) = rollout(40, 3)
    vs, _ = kernels.vtrace(torch.zeros_like(a), a, b, c, terminated, ended, valid, 0.99, 0.95)
    advantage = kernels.gae(a, b, c, terminated, ended, valid, 0.99, 0.95)
    torch.testing.assert_close(vs - b, advantage, rtol=1e-4, atol=1e-5)


def test_vtrace_matches_the_sum_of_equation_one() -> None:
    num_steps, gamma = 6, 0.9
    log_rhos, reward, value = (torch.randn(num_steps, 1, dtype=torch.float64) for _ in range(3))
    last_value = torch.randn(1, 1, dtype=torch.float64)
    next_value = torch.cat([value[1:], last_value])
    never = torch.zeros(num_steps, 1, dtype=torch.bool)
    vs, _ = kernels.vtrace(log_rhos, reward, value, next_value, never, never, None, gamma)
    rho = log_rhos.exp().clamp(max=1.0)
    for s in range(num_steps):
        total = value[s].clone()
        for t in range(s, num_steps):
            total += gamma ** (t - s) * rho[s:t].prod() * rho[t] * (reward[t] + gamma * next_value[t] - value[t])
        torch.testing.assert_close(vs[s], total)


def test_discounted_return_can_be_cut_into_calls() -> None:
    (a, *_), (_, ended, _) = rollout(20, 3)
    whole, end = kernels.discounted_return(a, ended, torch.zeros(3), 0.9)
    first, middle = kernels.discounted_return(a[:7], ended[:7], torch.zeros(3), 0.9)
    second, last = kernels.discounted_return(a[7:], ended[7:], middle, 0.9)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(last, end)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_nstep_by_hand(mode: str) -> None:
    reward = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    terminated = torch.tensor([False, False, True, False, False]).view(-1, 1)
    ended = terminated.clone()
    ended[4] = True
    t, env = torch.tensor([0, 1, 2, 3, 4]), torch.zeros(5, dtype=torch.int64)
    with kernels.force(mode):
        returns, discount, last = kernels.nstep_returns(reward, terminated, ended, t, env, 3, 2, 0.5)
    # Row 3 was written last, so nothing follows it; row 4 is older than row 0 and ended its episode.
    assert returns.tolist() == [2.0, 4.0, 4.0, 8.0, 16.0]
    assert discount.tolist() == [0.25, 0.0, 0.0, 0.5, 0.5]
    assert last.tolist() == [1, 2, 2, 3, 4]


def test_nstep_fast_equals_naive_and_wraps() -> None:
    (a, *_), (terminated, ended, _) = rollout(32, 4)
    t, env = torch.randint(0, 32, (200,)), torch.randint(0, 4, (200,))
    results = []
    for mode in ("auto", "naive"):
        with kernels.force(mode):
            results.append(kernels.nstep_returns(a, terminated, ended, t, env, 11, 5, 0.97))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    assert bool((results[0][2] < t).any())


def test_errors() -> None:
    flags = torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(InputError, match="flags are bool"):
        kernels.gae(*(torch.zeros(3, 2),) * 3, flags.float(), flags, None, 0.9, 0.9)
    with pytest.raises(InputError, match=r"t must lie in 0\.\.2"):
        kernels.nstep_returns(torch.zeros(3, 2), flags, flags, torch.tensor([3]), torch.tensor([0]), 0, 1, 0.9)
