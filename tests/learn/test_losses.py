"""Losses of preferences, rewards and distillation against their papers' formulas in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lockstep.core.errors import ConfigError
from lockstep.learn import losses

CHOSEN, REJECTED = [-0.4, -2.0, -0.9], [-1.1, -0.3, -0.9]
RATIO = [0.8, -1.3, 0.1]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(x: float) -> float:
    return math.exp(x) / (1 - math.exp(x))


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float, float], float]]] = {
    "dpo": (
        lambda c, r: losses.dpo_loss(c - r, num=3, beta=0.3)[0],
        lambda c, r: -math.log(sigmoid(0.3 * (c - r))),
    ),
    "cdpo": (
        lambda c, r: losses.dpo_loss(c - r, num=3, beta=0.3, label_smoothing=0.2)[0],
        lambda c, r: -0.8 * math.log(sigmoid(0.3 * (c - r))) - 0.2 * math.log(sigmoid(-0.3 * (c - r))),
    ),
    "ipo": (
        lambda c, r: losses.ipo_loss(c - r, num=3, tau=0.4)[0],
        lambda c, r: (c - r - 1 / 0.8) ** 2,
    ),
    "orpo": (
        lambda c, r: losses.orpo_loss(c, r, num=3, weight=0.7)[0],
        lambda c, r: -c - 0.7 * math.log(sigmoid(math.log(odds(c) / odds(r)))),
    ),
    "simpo": (
        lambda c, r: losses.simpo_loss(c, r, num=3, beta=2.5, gamma=0.6)[0],
        lambda c, r: -math.log(sigmoid(2.5 * c - 2.5 * r - 0.6)),
    ),
    "bradley-terry": (
        lambda c, r: losses.bradley_terry_loss(c, r, num=3, centre=0.1)[0],
        lambda c, r: -math.log(sigmoid(c - r)) + 0.1 * (c + r) ** 2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pair_losses_and_their_gradients(name: str) -> None:
    ours, formula = CASES[name]
    chosen = torch.tensor(CHOSEN, dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(REJECTED, dtype=torch.float64, requires_grad=True)
    loss = ours(chosen, rejected)
    assert loss.item() == pytest.approx(sum(map(formula, CHOSEN, REJECTED)) / 3)
    loss.backward()
    for i, (c, r) in enumerate(zip(CHOSEN, REJECTED, strict=True)):
        slope = (formula(c + 1e-6, r) - formula(c - 1e-6, r)) / 2e-6 / 3
        assert float(chosen.grad[i]) == pytest.approx(slope, rel=1e-4)  # type: ignore[index]
        slope = (formula(c, r + 1e-6) - formula(c, r - 1e-6)) / 2e-6 / 3
        assert float(rejected.grad[i]) == pytest.approx(slope, rel=1e-4)  # type: ignore[index]


def test_kto() -> None:
    labels = [True, False, True]
    for kl in (0.4, -1.0):
        loss, metrics = losses.kto_loss(
            torch.tensor(RATIO), torch.tensor(labels), kl, num=3, beta=0.5, good_weight=1.5, bad_weight=0.7
        )
        z = max(kl, 0.0)
        expected = sum(
            1.5 * (1 - sigmoid(0.5 * (r - z))) if good else 0.7 * (1 - sigmoid(0.5 * (z - r)))
            for r, good in zip(RATIO, labels, strict=True)
        )
        assert float(loss) == pytest.approx(expected / 3)
        assert float(metrics["reward_bad"]) == pytest.approx(0.5 * RATIO[1] / 3)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences(kind: str) -> None:
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    student = student.requires_grad_()
    found = losses.distribution_divergence(student, teacher, kind, temperature=1.7, beta=0.3)
    for row in range(4):
        s, t = ((x[row].detach() / 1.7).softmax(0).tolist() for x in (student, teacher))
        m = [0.3 * b + 0.7 * a for a, b in zip(s, t, strict=True)]

        def kl(p: list[float], q: list[float]) -> float:
            return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

        expected = {"forward_kl": kl(t, s), "reverse_kl": kl(s, t), "jsd": 0.3 * kl(t, m) + 0.7 * kl(s, m)}
        assert found[row].item() == pytest.approx(expected[kind])
    assert torch.autograd.gradcheck(
        lambda x: losses.distribution_divergence(x, teacher, kind, temperature=1.7, beta=0.3), (student,)
    )
    same = losses.distribution_divergence(teacher, teacher, kind)
    torch.testing.assert_close(same, torch.zeros_like(same))


def test_unknown_divergence() -> None:
    with pytest.raises(ConfigError, match="did you mean 'reverse_kl'"):
        losses.distribution_divergence(torch.zeros(1, 2), torch.zeros(1, 2), "reverse-kl")
    with pytest.raises(ConfigError, match="beta"):
        losses.distribution_divergence(torch.zeros(1, 2), torch.zeros(1, 2), "jsd", beta=1.0)
