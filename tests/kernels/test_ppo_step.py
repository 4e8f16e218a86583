"""The graph-free PPO gradient has the bits of the composed ops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError, InputError


def net(*sizes: int) -> kernels.Net:
    weights = [torch.nn.Parameter(torch.randn(a, b) / a**0.5) for a, b in itertools.pairwise(sizes)]
    return kernels.Net(weights, [torch.nn.Parameter(torch.randn(b)) for b in sizes[1:]], "tanh")


def make(kind: str, num: int) -> tuple[kernels.PPOStep, list[Tensor]]:
    features = torch.randn(num, 4)
    columns = [torch.randn(num) for _ in range(4)]
    if kind == "gaussian":
        head = kernels.Head("gaussian", log_std=torch.nn.Parameter(torch.randn(3) * 0.1))
        actor, actions = net(4, 64, 33, 3), torch.randn(num, 3)
    else:
        nvec = (2, 3) if kind == "multi" else None
        head = kernels.Head("categorical", nvec=nvec)
        actor = net(4, 64, 33, 5)
        actions = torch.stack([torch.randint(0, n, (num,)) for n in nvec or (5,)], 1)
    critic = net(4, 17, 1)
    step = kernels.PPOStep(actor, head, critic, num, clip=0.2, value_clip=None, value_coef=0.5, entropy_coef=0.01)
    return step, [features, actions, *columns]


@pytest.mark.parametrize("kind", ["categorical", "multi", "gaussian"])
@pytest.mark.parametrize("num", [1, 2, 63, 64, 500])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_composed_ops(kind: str, num: int, masked: bool) -> None:
    step, (features, actions, *columns) = make(kind, num)
    mask = torch.rand(num) > 0.3 if masked else None
    stats = step.run(features, actions, *columns, mask).clone()
    fast = [p.grad.clone() for p in step.params if p.grad is not None]
    logprob = step.logprob.clone()
    step._run_composed(features, actions, tuple(columns), mask)
    assert len(fast) == len(step.params)
    for p, g in zip(step.params, fast, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)
    assert torch.equal(step.stats, stats)
    assert torch.equal(step.logprob, logprob)
    with kernels.force("naive"):
        naive_stats = step.run(features, actions, *columns, mask)
    torch.testing.assert_close(naive_stats, stats, rtol=1e-3, atol=1e-4)


def test_trains_with_the_optimiser() -> None:
    step, (features, actions, *columns) = make("categorical", 64)
    optimiser = kernels.FusedAdam(step.params, lr=0.01)
    losses = []
    for _ in range(60):
        losses.append(float(step.run(features, actions, *columns)[1]))
        optimiser.step(0.5)
        optimiser.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_errors() -> None:
    step, (features, actions, *columns) = make("categorical", 8)
    with pytest.raises(InputError, match="features"):
        step.run(features[:7], actions, *columns)
    with pytest.raises(InputError, match="row 0"):
        step.run(features, actions + 9, *columns)
    with pytest.raises(ConfigError, match="squashed"):
        kernels.PPOStep(
            net(4, 4),
            kernels.Head("squashed"),
            net(4, 1),
            8,
            clip=0.2,
            value_clip=None,
            value_coef=0.5,
            entropy_coef=0.0,
        )
