"""Soft actor-critic gradients in two calls: the bits of the composed ops, and close to the naive twin."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels import Head, Net, SoftGradients, TransitionRows
from lockstep.kernels.soft_actor_critic import naive
from lockstep.rl.losses import critic_loss, sac_actor_loss

SQUASHED = Head("squashed", log_std_min=-5.0, log_std_max=0.5)


def make_net(
    sizes: tuple[int, ...], activation: str = "relu", dtype: str = "fp32", *, members: int = 0, bias: bool = True
) -> Net:
    lead = (members,) if members else ()
    pairs = list(itertools.pairwise(sizes))
    weights = [(torch.randn(*lead, k, n) / k**0.5).requires_grad_() for k, n in pairs]
    biases = [(0.1 * torch.randn(*lead, n)).requires_grad_() if bias else None for _, n in pairs]
    return Net(weights, biases, activation, "none", dtype)


def make_nets(
    num_features: int,
    num_actions: int,
    activation: str = "relu",
    dtype: str = "fp32",
    *,
    members: int = 2,
    width: int = 33,
) -> tuple[Net, Net, Net]:
    actor = make_net((num_features, 17, width, 2 * num_actions), activation, dtype)
    sizes = num_features + num_actions, 18, width, 1
    return actor, *(make_net(sizes, activation, dtype, members=members) for _ in range(2))  # type: ignore[return-value]


def make_rows(num: int, num_features: int, num_actions: int) -> TransitionRows:
    discount = 0.99 * (torch.rand(num) < 0.8)
    features, action = torch.randn(2, num, num_features), torch.rand(num, num_actions) * 2 - 1
    return TransitionRows(features[0], action, 2 * torch.randn(num), features[1], discount)


def grads_of(params: list[Tensor]) -> list[Tensor]:
    return [p.grad.clone() for p in params]  # type: ignore[union-attr]


def move(params: list[Tensor]) -> None:
    """As an optimiser does between the two calls."""
    with torch.no_grad():
        for p in params:
            p.sub_(0.1 * p.grad)  # type: ignore[operator]


def both_steps(
    function: SoftGradients, rows: TransitionRows, index: Tensor, normal: Tensor, alpha: float
) -> tuple[Tensor, list[float], list[Tensor]]:
    """(entropy, means, gradients); the critics are put back to where they were."""
    before = [p.detach().clone() for p in function.critic_params]
    entropy, *means = function.critics(rows, index, normal, alpha)
    grads = grads_of(function.critic_params)
    move(function.critic_params)
    means += function.actor(alpha)
    with torch.no_grad():
        for p, old in zip(function.critic_params, before, strict=True):
            p.copy_(old)
    return entropy, means, grads + grads_of(function.actor_params)


def composed_steps(
    function: SoftGradients,
    nets: tuple[Net, Net, Net],
    rows: TransitionRows,
    index: Tensor,
    normal: Tensor,
    alpha: float,
) -> tuple[Tensor, list[float], list[Tensor]]:
    bounds = SQUASHED.log_std_min, SQUASHED.log_std_max
    batch, (entropy, *means) = naive.critic_gradients(*nets, bounds, rows, index, normal, alpha)
    grads = grads_of(function.critic_params)
    move(function.critic_params)
    means += naive.actor_gradients(nets[0], nets[1], batch, alpha)
    return entropy, means, grads + grads_of(function.actor_params)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
@pytest.mark.parametrize(("num", "members"), [(1, 2), (63, 1), (300, 3)])
def test_equals_composed_ops_bit_for_bit(num: int, members: int, activation: str, dtype: str) -> None:
    nets = make_nets(5, 3, activation, dtype, members=members)
    function, rows = SoftGradients(*nets, SQUASHED), make_rows(1000, 5, 3)
    index, normal = torch.randint(0, 1000, (num,)), torch.randn(2, num, 3)
    entropy, means, fused = both_steps(function, rows, index, normal, 0.3)
    composed_entropy, composed_means, composed = composed_steps(function, nets, rows, index, normal, 0.3)
    assert torch.equal(entropy, composed_entropy)
    assert means == pytest.approx(composed_means, rel=1e-5)
    for a, b in zip(fused, composed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("members", [2, 3])
def test_threads_change_no_bit(members: int) -> None:
    nets = make_nets(17, 6, members=members, width=128)
    function, rows = SoftGradients(*nets, SQUASHED), make_rows(500, 17, 6)
    index, normal = torch.randint(0, 500, (256,)), torch.randn(2, 256, 6)
    runs = []
    for threads in (1, 2, 3, 1):
        kernels.set_num_threads(threads)
        runs.append(both_steps(function, rows, index, normal, 0.3))
    for entropy, means, grads in runs[1:]:
        assert torch.equal(entropy, runs[0][0])
        assert means == runs[0][1]
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][2], strict=True))


def test_equal_critics_share_one_gradient_path() -> None:
    nets = make_nets(5, 3)
    with torch.no_grad():
        for tensor in (*nets[1].weights, *nets[1].biases):
            tensor[1] = tensor[0]  # type: ignore[index]
    function, rows = SoftGradients(*nets, SQUASHED), make_rows(50, 5, 3)
    arguments = rows, torch.arange(50), torch.randn(2, 50, 3), 0.3
    fused = both_steps(function, *arguments)[2]
    assert all(torch.equal(a, b) for a, b in zip(fused, composed_steps(function, nets, *arguments)[2], strict=True))


def test_close_to_naive_twin_and_the_gradients_of_the_losses() -> None:
    nets = make_nets(7, 2, "tanh")
    function, rows = SoftGradients(*nets, SQUASHED), make_rows(300, 7, 2)
    index, normal, alpha = torch.randperm(300)[:129], torch.randn(2, 129, 2), 0.2
    entropy, means, fused = both_steps(function, rows, index, normal, alpha)
    with kernels.force("naive"):
        slow_entropy, slow_means, slow = both_steps(function, rows, index, normal, alpha)
        by_autograd = autograd_of_losses(function, nets, rows, index, normal, alpha)
    torch.testing.assert_close(entropy, slow_entropy, rtol=1e-4, atol=1e-5)
    assert means == pytest.approx(slow_means, rel=1e-3)
    for a, b, c in zip(fused, slow, by_autograd, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-6)


def autograd_of_losses(
    function: SoftGradients,
    nets: tuple[Net, Net, Net],
    rows: TransitionRows,
    index: Tensor,
    normal: Tensor,
    alpha: float,
) -> list[Tensor]:
    def apply(net: Net, *parts: Tensor) -> Tensor:
        return kernels.mlp(torch.cat(parts, 1), net.weights, net.biases, net.activation, "none", net.dtype)

    def sample(features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.squashed_gaussian_head(apply(nets[0], features), (-5.0, 0.5), noise)

    features, next_features = rows.features[index], rows.next_features[index]
    with torch.no_grad():
        next_action, next_logprob = sample(next_features, normal[1])
        next_value = apply(nets[2], next_features, next_action).squeeze(2).amin(0) - alpha * next_logprob
    values = apply(nets[1], features, rows.action[index]).squeeze(2)
    loss, _ = critic_loss(values, rows.reward[index] + rows.discount[index] * next_value)
    grads = list(torch.autograd.grad(loss, function.critic_params))
    for p, grad in zip(function.critic_params, grads, strict=True):
        p.grad = grad
    move(function.critic_params)
    action, logprob = sample(features, normal[0])
    q = apply(nets[1], features, action).squeeze(2).amin(0)
    actor_loss, _ = sac_actor_loss(logprob, q, torch.tensor(alpha))
    return grads + list(torch.autograd.grad(actor_loss, function.actor_params))


def test_no_biases_moved_parameters_and_other_rows() -> None:
    actor = make_net((4, 8, 4), bias=False)
    nets = actor, *(make_net((6, 8, 1), members=2, bias=False) for _ in range(2))
    function = SoftGradients(*nets, SQUASHED)
    for num, net in zip((50, 20, 31), nets, strict=True):
        arguments = make_rows(60, 4, 2), torch.arange(num), torch.randn(2, num, 2), 0.1
        fused = both_steps(function, *arguments)[2]
        composed = composed_steps(function, nets, *arguments)[2]
        assert all(torch.equal(a, b) for a, b in zip(fused, composed, strict=True))
        net.weights[0].data = torch.randn(net.weights[0].shape)


def test_nan_of_one_critic_reaches_targets_and_actor() -> None:
    nets = make_nets(4, 2)
    with torch.no_grad():
        nets[2].biases[-1][1] = torch.nan  # type: ignore[index]
    function, rows = SoftGradients(*nets, SQUASHED), make_rows(10, 4, 2)
    _, loss, _ = function.critics(rows, torch.arange(10), torch.randn(2, 10, 2), 0.1)
    assert loss != loss
    with torch.no_grad():
        nets[1].biases[-1][1] = torch.nan  # type: ignore[index]
    assert function.actor(0.1)[1] != function.actor(0.1)[1]


def test_errors_name_the_part() -> None:
    nets, rows, normal = make_nets(4, 2), make_rows(10, 4, 2), torch.randn(2, 2, 2)
    function = SoftGradients(*nets, SQUASHED)
    with pytest.raises(InputError, match=r"index\[1\] is 10"):
        function.critics(rows, torch.tensor([0, 10]), normal, 0.1)
    with pytest.raises(InputError, match="expected int64"):
        function.critics(rows, torch.tensor([0.0, 1.0]), normal, 0.1)
    with pytest.raises(InputError, match="normal is"):
        function.critics(rows, torch.tensor([0]), normal, 0.1)
    with pytest.raises(InputError, match="action is"):
        function.critics(make_rows(10, 4, 3), torch.tensor([0, 1]), normal, 0.1)
    with pytest.raises(ConfigError, match="expected 'squashed'"):
        SoftGradients(*nets, Head("gaussian"))
    with pytest.raises(InputError, match="same sizes"):
        SoftGradients(nets[0], nets[1], make_net((6, 9, 1), members=2), SQUASHED)
    with pytest.raises(InputError, match="critics must map 4 features and 2 actions"):
        SoftGradients(nets[0], *(make_net((7, 9, 1), members=2) for _ in range(2)), SQUASHED)
    with pytest.raises(InputError, match="2A outputs; got 3"):
        SoftGradients(make_net((4, 8, 3)), nets[1], nets[2], SQUASHED)
