"""Minibatch gradients in one call: the bits of the composed ops, and close to the naive twin."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels import ActorCriticGradients, Head, Net, RolloutRows
from lockstep.kernels.actor_critic import naive

HEADS: dict[str, tuple[Head, int]] = {
    "categorical": (Head("categorical"), 3),
    "blocks": (Head("categorical", nvec=(3, 2, 5)), 10),
    "gaussian": (Head("gaussian", log_std=torch.full((6,), -0.5, requires_grad=True)), 6),
}
SCALARS = {"clip": 0.2, "value_clip": None, "value_coef": 0.5, "entropy_coef": 0.01, "normalise_advantage": True}


def make_net(sizes: tuple[int, ...], activation: str, dtype: str, *, bias: bool = True) -> Net:
    pairs = list(itertools.pairwise(sizes))
    weights = [(torch.randn(k, n) / k**0.5).requires_grad_() for k, n in pairs]
    biases = [(0.1 * torch.randn(n)).requires_grad_() if bias else None for _, n in pairs]
    return Net(weights, biases, activation, "none", dtype)


def make(kind: str, num_obs: int, hidden: tuple[int, ...], activation: str = "tanh", dtype: str = "fp32"):  # type: ignore[no-untyped-def]
    head, width = HEADS[kind]
    actor = make_net((num_obs, *hidden, width), activation, dtype)
    return actor, make_net((num_obs, *hidden, 1), activation, dtype), head


def make_rows(num: int, num_obs: int, head: Head, width: int) -> RolloutRows:
    if head.kind == "gaussian":
        action = torch.randn(num, width)
    else:
        blocks = [torch.randint(0, n, (num,)) for n in head.nvec or (width,)]
        action = torch.stack(blocks, 1) if head.nvec else blocks[0]
    return RolloutRows(torch.randn(num, num_obs), action, -torch.rand(num) * 2, torch.randn(num), torch.randn(num))


def arguments(scalars: dict[str, float]) -> tuple[tuple[float, ...], bool]:
    clip = -1.0 if scalars["value_clip"] is None else scalars["value_clip"]
    return (scalars["clip"], clip, scalars["value_coef"], scalars["entropy_coef"]), bool(scalars["normalise_advantage"])


def grads_of(function: ActorCriticGradients) -> list[Tensor]:
    return [p.grad.clone() for p in function.params]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
@pytest.mark.parametrize("num", [1, 63, 500])
def test_equals_composed_ops_bit_for_bit(kind: str, dtype: str, activation: str, num: int) -> None:
    spec = make(kind, 5, (17, 33), activation, dtype)
    function = ActorCriticGradients(*spec)
    rows = make_rows(1000, 5, spec[2], HEADS[kind][1])
    for scalars in (SCALARS, {**SCALARS, "value_clip": 0.1, "normalise_advantage": False}):
        index = torch.randperm(1000)[:num]
        stats = function(rows, index, **scalars)  # type: ignore[arg-type]
        fused = grads_of(function)
        composed_stats = naive.gradients(*spec, rows, index, *arguments(scalars))  # type: ignore[arg-type]
        assert torch.equal(stats, composed_stats)
        for a, b in zip(fused, grads_of(function), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", HEADS)
def test_close_to_naive_twin(kind: str) -> None:
    spec = make(kind, 7, (9, 8))
    function = ActorCriticGradients(*spec)
    rows = make_rows(300, 7, spec[2], HEADS[kind][1])
    index = torch.randperm(300)[:129]
    stats, fused = function(rows, index, **SCALARS), grads_of(function)  # type: ignore[arg-type]
    with kernels.force("naive"):
        slow = function(rows, index, **SCALARS)  # type: ignore[arg-type]
    torch.testing.assert_close(stats, slow, rtol=1e-4, atol=1e-5)
    for a, b in zip(fused, grads_of(function), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_threads_change_nothing() -> None:
    spec = make("blocks", 17, (64, 64))
    function = ActorCriticGradients(*spec)
    rows = make_rows(2000, 17, spec[2], 10)
    results = []
    for threads in (1, 2, 3):
        kernels.set_num_threads(threads)
        try:
            stats = function(rows, torch.arange(1111), **SCALARS)  # type: ignore[arg-type]
        finally:
            kernels.set_num_threads(1)
        results.append([stats, *grads_of(function)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_no_biases_moved_parameters_and_another_rollout() -> None:
    head = HEADS["categorical"][0]
    actor, critic = make_net((4, 8, 3), "tanh", "fp32", bias=False), make_net((4, 8, 1), "relu", "fp32")
    function = ActorCriticGradients(actor, critic, head)
    for _ in range(2):
        rows = make_rows(50, 4, head, 3)
        stats, fused = function(rows, torch.arange(50), **SCALARS), grads_of(function)  # type: ignore[arg-type]
        composed = naive.gradients(actor, critic, head, rows, torch.arange(50), *arguments(SCALARS))  # type: ignore[arg-type]
        assert torch.equal(stats, composed)
        assert all(torch.equal(a, b) for a, b in zip(fused, grads_of(function), strict=True))
        actor.weights[0].data = torch.randn(4, 8)


def test_errors_name_the_part() -> None:
    spec = make("categorical", 4, (8,))
    function = ActorCriticGradients(*spec)
    rows = make_rows(20, 4, spec[2], 3)
    for index, message in (([0, 20], "index\\[1\\] is 20"), ([-1], "index\\[0\\] is -1")):
        with pytest.raises(InputError, match=message):
            function(rows, torch.tensor(index), **SCALARS)  # type: ignore[arg-type]
    rows.action[7] = 3
    with pytest.raises(InputError, match="action of row 7 is 3"):
        function(rows, torch.arange(20), **SCALARS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="features"):
        function(replace(rows, features=torch.zeros(4, 20).T), torch.arange(3), **SCALARS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"action is torch\.float32"):
        function(replace(rows, action=torch.zeros(20)), torch.arange(3), **SCALARS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="squashed"):
        ActorCriticGradients(spec[0], spec[1], Head("squashed"))
    with pytest.raises(InputError, match="1 value"):
        ActorCriticGradients(spec[0], spec[0], spec[2])


@pytest.mark.parametrize("num", [0, 1, 2, 63, 1000])
def test_normalise_equals_naive(num: int) -> None:
    x = torch.randn(num) * 3 + 5
    mask = torch.rand(num) < 0.7
    for m in (None, mask):
        with kernels.force("naive"):
            slow = kernels.normalise(x, m)
        torch.testing.assert_close(kernels.normalise(x, m), slow, rtol=1e-6, atol=1e-6)
    if num > 2:
        out = kernels.normalise(x, mask)[mask]
        assert float(out.mean().abs()) < 1e-5
        assert abs(float(out.std()) - 1) < 1e-5
