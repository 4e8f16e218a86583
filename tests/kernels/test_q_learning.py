"""Q-learning gradients in one call: the bits of the composed ops, and close to the naive twin."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import InputError
from lockstep.kernels import Net, QGradients, TransitionRows
from lockstep.kernels.q_learning import naive
from lockstep.rl.losses import td_loss


def make_net(sizes: tuple[int, ...], activation: str = "relu", dtype: str = "fp32", *, bias: bool = True) -> Net:
    pairs = list(itertools.pairwise(sizes))
    weights = [(torch.randn(k, n) / k**0.5).requires_grad_() for k, n in pairs]
    biases = [(0.1 * torch.randn(n)).requires_grad_() if bias else None for _, n in pairs]
    return Net(weights, biases, activation, "none", dtype)


def make_rows(num: int, num_obs: int, num_actions: int) -> TransitionRows:
    discount = 0.99 * (torch.rand(num) < 0.8)
    features = torch.randn(2, num, num_obs)
    return TransitionRows(
        features[0], torch.randint(0, num_actions, (num,)), 2 * torch.randn(num), features[1], discount
    )


def grads_of(function: QGradients) -> list[Tensor]:
    return [p.grad.clone() for p in function.params]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
@pytest.mark.parametrize("num", [1, 32, 500])
def test_equals_composed_ops_bit_for_bit(num: int, activation: str, dtype: str) -> None:
    torch.manual_seed(num)
    nets = [make_net((5, 17, 33, 3), activation, dtype) for _ in range(2)]
    function, rows = QGradients(*nets), make_rows(1000, 5, 3)
    for is_double, weight in itertools.product((False, True), (None, torch.rand(num))):
        index = torch.randint(0, 1000, (num,))
        error, *means = function(rows, index, weight_B=weight, is_double=is_double)
        fused = grads_of(function)
        composed, *composed_means = naive.gradients(*nets, rows, index, weight, is_double)
        assert torch.equal(error, composed)
        assert means == pytest.approx(composed_means, rel=1e-6)
        for a, b in zip(fused, grads_of(function), strict=True):
            assert torch.equal(a, b)


def test_close_to_naive_twin_and_the_gradient_of_the_huber_loss() -> None:
    torch.manual_seed(0)
    nets = [make_net((7, 9, 8, 4), "tanh") for _ in range(2)]
    function, rows, index, weight = QGradients(*nets), make_rows(300, 7, 4), torch.randperm(300)[:129], torch.rand(129)
    error, fused = function(rows, index, weight_B=weight)[0], grads_of(function)
    with kernels.force("naive"):
        slow = function(rows, index, weight_B=weight)[0]
        slow_grads = grads_of(function)
        values, next_values = (
            kernels.mlp(x[index], n.weights, n.biases, n.activation, n.output_activation, n.dtype)
            for x, n in zip((rows.features, rows.next_features), nets, strict=True)
        )
        target = rows.reward[index] + rows.discount[index] * next_values.detach().amax(1)
        loss, _ = td_loss(values.gather(1, rows.action[index].unsqueeze(1)).squeeze(1), target, weight)
        by_autograd = torch.autograd.grad(loss, function.params)
    torch.testing.assert_close(error, slow, rtol=1e-4, atol=1e-5)
    for a, b, c in zip(fused, slow_grads, by_autograd, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-6)


def test_no_biases_moved_parameters_and_other_rows() -> None:
    torch.manual_seed(0)
    nets = [make_net((4, 8, 3), bias=False) for _ in range(2)]
    function = QGradients(*nets)
    for which in (0, 1):
        rows, index = make_rows(50, 4, 3), torch.arange(50)
        error, fused = function(rows, index)[0], grads_of(function)
        assert torch.equal(error, naive.gradients(*nets, rows, index, None, False)[0])
        assert all(torch.equal(a, b) for a, b in zip(fused, grads_of(function), strict=True))
        nets[which].weights[0].data = torch.randn(4, 8)


def test_nan_of_the_target_network_reaches_the_error() -> None:
    online, target = make_net((4, 8, 3)), make_net((4, 8, 3))
    with torch.no_grad():
        target.biases[-1][1] = torch.nan  # type: ignore[index]
    error = QGradients(online, target)(make_rows(10, 4, 3), torch.arange(10))[0]
    assert error.isnan().all()


def test_errors_name_the_part() -> None:
    function, rows = QGradients(make_net((4, 8, 3)), make_net((4, 8, 3))), make_rows(10, 4, 3)
    with pytest.raises(InputError, match=r"index\[1\] is 10"):
        function(rows, torch.tensor([0, 10]))
    with pytest.raises(InputError, match="expected int64"):
        function(rows, torch.tensor([0.0]))
    with pytest.raises(InputError, match="weight is"):
        function(rows, torch.tensor([0]), weight_B=torch.ones(2))
    with pytest.raises(InputError, match="features is"):
        function(make_rows(10, 5, 3), torch.tensor([0]))
    rows.action[3] = 3
    with pytest.raises(InputError, match="action of row 3 is 3"):
        function(rows, torch.tensor([3]))
    with pytest.raises(InputError, match="same sizes"):
        QGradients(make_net((4, 8, 3)), make_net((4, 9, 3)))
