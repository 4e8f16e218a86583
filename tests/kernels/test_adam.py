"""Adam against torch.optim, clipping, state, Polyak averaging."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import CheckpointError, ConfigError

SHAPES = [(4, 64), (64,), (64, 64), (3,), (1,), (17, 2)]


def params_and_grads() -> tuple[list[Tensor], list[list[Tensor]]]:
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    return params, [[torch.randn(s) for s in SHAPES] for _ in range(5)]


@pytest.mark.parametrize("mode", ["auto", "naive"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_agrees_with_torch(mode: str, decay: float, max_norm: float | None) -> None:
    mine, all_grads = params_and_grads()
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours = kernels.FusedAdam(mine, lr=0.01, weight_decay=decay)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=decay)
    with kernels.force(mode):
        for grads in all_grads:
            for p, q, g in zip(mine, theirs, grads, strict=True):
                p.grad, q.grad = g.clone(), g.clone()
            norm = ours.step(max_norm)
            expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm or 1e9)
            assert norm == pytest.approx(float(expected), rel=1e-5)
            reference.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_state_round_trip_continues_exactly() -> None:
    params, all_grads = params_and_grads()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    first, second = kernels.FusedAdam(params, lr=0.01), kernels.FusedAdam(copies, lr=0.5)
    for step, grads in enumerate(all_grads):
        if step == 3:
            second.load_state_dict(first.state_dict())
            for p, q in zip(params, copies, strict=True):
                q.data.copy_(p.data)
        for p, q, g in zip(params, copies, grads, strict=True):
            p.grad, q.grad = g, g
        first.step(1.0)
        if step >= 3:
            second.step(1.0)
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)


def test_parameters_without_gradient_are_left_alone() -> None:
    a, b = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    a.grad = torch.ones(5)
    optimiser = kernels.FusedAdam([a, b], lr=0.1)
    optimiser.step()
    assert torch.equal(b, torch.ones(5))
    assert not torch.equal(a, torch.ones(5))
    optimiser.zero_grad()
    assert a.grad is None


def test_a_saved_graph_notices_the_step() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    kernels.FusedAdam([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_polyak(mode: str) -> None:
    targets, sources = [torch.randn(s) for s in SHAPES], [torch.randn(s) for s in SHAPES]
    expected = [t + 0.005 * (s - t) for t, s in zip(targets, sources, strict=True)]
    with kernels.force(mode):
        kernels.polyak(targets, sources, 0.005)
    for t, e in zip(targets, expected, strict=True):
        torch.testing.assert_close(t, e)


def test_errors() -> None:
    with pytest.raises(ConfigError, match="no parameters"):
        kernels.FusedAdam([])
    optimiser = kernels.FusedAdam([torch.ones(3)])
    with pytest.raises(CheckpointError, match="shapes"):
        optimiser.load_state_dict(kernels.FusedAdam([torch.ones(4)]).state_dict())
    with pytest.raises(CheckpointError, match="lacks"):
        optimiser.load_state_dict({})
