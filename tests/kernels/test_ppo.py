"""PPO loss: fast against naive, masks, value clipping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep import kernels


def batch(num: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    logprob, entropy, value = (torch.randn(num, dtype=dtype, requires_grad=True) for _ in range(3))
    return [logprob, entropy, value, *(torch.randn(num, dtype=dtype) for _ in range(4))]


def run(mode: str, data: list[Tensor], value_clip: float | None, mask: Tensor | None) -> list[Tensor]:
    with kernels.force(mode):
        loss, stats = kernels.ppo_surrogate(*data, 0.2, value_clip, 0.5, 0.01, mask)
        return [loss, stats, *torch.autograd.grad(3.0 * loss, data[:3])]


@pytest.mark.parametrize("num", [1, 2, 63, 64, 1000])
@pytest.mark.parametrize("value_clip", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_naive(num: int, value_clip: float | None, masked: bool) -> None:
    data = batch(num)
    mask = torch.rand(num) > 0.4 if masked else None
    for a, b in zip(run("auto", data, value_clip, mask), run("naive", data, value_clip, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("value_clip", [None, 0.3])
def test_naive_gradient_matches_finite_differences(value_clip: float | None) -> None:
    data = batch(7, torch.float64)
    mask = torch.tensor([True] * 5 + [False] * 2)

    def loss(logprob: Tensor, entropy: Tensor, value: Tensor) -> Tensor:
        return kernels.ppo_surrogate(logprob, entropy, value, *data[3:], 0.2, value_clip, 0.5, 0.01, mask)[0]

    with kernels.force("naive"):
        assert torch.autograd.gradcheck(loss, data[:3])


def test_masked_samples_do_not_matter_even_when_nan() -> None:
    data = batch(20)
    mask = torch.arange(20) < 12
    kept = run("auto", [t[:12].detach().requires_grad_() for t in data[:3]] + [t[:12] for t in data[3:]], None, None)
    spoiled = [torch.where(mask, t.detach(), torch.nan).requires_grad_() for t in data[:3]]
    spoiled += [torch.where(mask, t, torch.nan) for t in data[3:]]
    masked = run("auto", spoiled, None, mask)
    for a, b in zip(kept[2:], masked[2:], strict=True):
        assert torch.equal(a, b[:12])
        assert torch.equal(b[12:], torch.zeros(8))
    assert torch.equal(kept[0], masked[0])
    assert torch.equal(kept[1], masked[1])


def test_exact_replay_has_ratio_one() -> None:
    data = batch(50)
    data[3] = data[0].detach().clone()
    _, stats, *_ = run("auto", data, None, None)
    assert float(stats[5]) == 0.0
    assert float(stats[3]) == 0.0
