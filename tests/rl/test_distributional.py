from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.rl.distributional import project_categorical, quantile_midpoints, truncate_quantiles
from lockstep.rl.losses import quantile_huber_loss


def brute_force(probs: np.ndarray, reward: float, discount: float, support: np.ndarray) -> np.ndarray:
    """Each atom's mass, split between the support points around it."""
    out = np.zeros(len(support))
    for p, z in zip(probs, support, strict=True):
        place = min(max(reward + discount * z, support[0]), support[-1])
        right = int(np.searchsorted(support, place - 1e-9))
        if abs(support[right] - place) < 1e-9:
            out[right] += p
            continue
        share = (place - support[right - 1]) / (support[right] - support[right - 1])
        out[right - 1] += p * (1 - share)
        out[right] += p * share
    return out


@pytest.mark.parametrize(("low", "high", "num"), [(-10.0, 10.0, 51), (0.0, 1.0, 2), (-3.0, 5.0, 9)])
def test_projection_equals_brute_force(low, high, num):
    generator = torch.Generator().manual_seed(0)
    support = torch.linspace(low, high, num, dtype=torch.float64)
    probs = torch.softmax(torch.randn(40, num, generator=generator, dtype=torch.float64), 1)
    reward = torch.randn(40, generator=generator, dtype=torch.float64) * (high - low)
    discount = torch.where(torch.arange(40) % 3 == 0, 0.0, 0.97).double()
    reward[0], discount[1] = 1.0, 1.0
    out = project_categorical(probs, reward, discount, support)
    for b in range(40):
        expected = brute_force(probs[b].numpy(), float(reward[b]), float(discount[b]), support.numpy())
        assert np.allclose(out[b].numpy(), expected, atol=1e-9)


def test_projection_in_float32_keeps_mass_and_mean():
    support = torch.linspace(-10, 10, 51)
    probs = torch.softmax(torch.randn(64, 51, generator=torch.Generator().manual_seed(1)), 1)
    out = project_categorical(probs, torch.linspace(-1, 1, 64), torch.full((64,), 0.5), support)
    assert torch.allclose(out.sum(1), torch.ones(64), atol=1e-5)
    mean = torch.linspace(-1, 1, 64) + 0.5 * (probs * support).sum(1)
    assert torch.allclose((out * support).sum(1), mean, atol=1e-4)


def test_the_identity_projects_to_itself():
    support = torch.linspace(-10, 10, 51)
    probs = torch.softmax(torch.randn(8, 51, generator=torch.Generator().manual_seed(1)), 1)
    assert torch.allclose(project_categorical(probs, torch.zeros(8), torch.ones(8), support), probs, atol=1e-4)


def test_midpoints_and_truncation():
    assert torch.allclose(quantile_midpoints(4), torch.tensor([0.125, 0.375, 0.625, 0.875]))
    quantiles = torch.tensor([[[3.0, 1.0], [0.0, 9.0]], [[2.0, 8.0], [5.0, 4.0]]])
    assert truncate_quantiles(quantiles, 1).tolist() == [[1.0, 2.0, 3.0], [0.0, 4.0, 5.0]]
    assert truncate_quantiles(quantiles, 0).shape == (2, 4)


def test_quantile_loss_and_gradient_equal_the_definition():
    generator = torch.Generator().manual_seed(0)
    quantiles = (torch.randn(5, 7, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    target = torch.randn(5, 11, generator=generator, dtype=torch.float64) * 2
    weight = torch.rand(5, generator=generator, dtype=torch.float64)
    loss, row_loss = quantile_huber_loss(quantiles, target, weight)
    loss.backward()
    expected, gradient = np.zeros(5), np.zeros((5, 7))
    for b in range(5):
        for i in range(7):
            for j in range(11):
                delta = float(target[b, j] - quantiles[b, i].detach())
                share = abs((i + 0.5) / 7 - (delta < 0)) / 11
                expected[b] += share * (0.5 * delta**2 if abs(delta) <= 1 else abs(delta) - 0.5)
                gradient[b, i] -= share * max(-1.0, min(1.0, delta)) * float(weight[b]) / 5
    assert np.allclose(row_loss.numpy(), expected)
    assert float(loss.detach()) == pytest.approx(float((expected * weight.numpy()).mean()))
    assert np.allclose(quantiles.grad.numpy(), gradient)
