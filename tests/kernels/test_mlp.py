"""Dense chains: fast against naive, forward and gradient, and the exactness contract."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError, InputError

ROWS = (1, 2, 63, 64, 1000)
WIDTHS = (1, 2, 3, 17, 63, 64, 256)
TOLERANCE = {"fp32": 2e-5, "bf16": 4e-4}


def make_net(sizes: tuple[int, ...], members: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    lead = (members,) if members else ()
    pairs = list(itertools.pairwise(sizes))
    weights = [(torch.randn(*lead, k, n) / k**0.5).requires_grad_() for k, n in pairs]
    biases = [torch.randn(*lead, n).requires_grad_() for _, n in pairs]
    return weights, biases


def run(mode: str, x: Tensor, weights: list[Tensor], biases: list[Tensor], *args: str, dtype: str) -> list[Tensor]:
    """Output and all gradients of a fixed scalar."""
    with kernels.force(mode):
        y = kernels.mlp(x, weights, biases, *args, dtype=dtype)
        weight = torch.linspace(-1.0, 2.0, y.numel()).view_as(y)
        return [y, *torch.autograd.grad((y * weight).sum(), [x, *weights, *biases])]


def assert_close(fast: list[Tensor], slow: list[Tensor], tolerance: float) -> None:
    for a, b in zip(fast, slow, strict=True):
        assert a.shape == b.shape
        scale = float(b.detach().abs().max()) + 1e-6
        assert float((a - b).detach().abs().max()) <= tolerance * scale


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_layer_equals_naive_at_odd_sizes(rows: int, dtype: str) -> None:
    pairs = (
        list(zip(WIDTHS, (*WIDTHS[3:], *WIDTHS[:3]), strict=True))
        if rows in (2, 64, 1000)
        else itertools.product(WIDTHS, WIDTHS)
    )
    for k, n in pairs:
        weights, biases = make_net((k, n))
        x = torch.randn(rows, k, requires_grad=True)
        fast = run("auto", x, weights, biases, "none", dtype=dtype)
        slow = run("naive", x, weights, biases, "none", dtype=dtype)
        assert_close(fast, slow, TOLERANCE[dtype] * 5)


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("members", [0, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_chain_equals_naive(activation: str, members: int, dtype: str) -> None:
    weights, biases = make_net((3, 17, 33, 5), members)
    x = torch.randn(63, 3, requires_grad=True)
    output = "none" if activation == "tanh" else activation
    fast = run("auto", x, weights, biases, activation, output, dtype=dtype)
    slow = run("naive", x, weights, biases, activation, output, dtype=dtype)
    # A rounding difference before a bf16 rounding can move an operand by one bf16 step.
    assert_close(fast, slow, 2e-5 if dtype == "fp32" else 2e-2)


def test_member_inputs_equal_separate_chains() -> None:
    weights, biases = make_net((5, 16, 2), members=3)
    x = torch.randn(3, 20, 5)
    y = kernels.mlp(x, weights, biases, "relu")
    for e in range(3):
        alone = kernels.mlp(x[e], [w[e] for w in weights], [b[e] for b in biases], "relu")
        assert torch.equal(y[e], alone)


@pytest.mark.parametrize("mode", ["auto", "naive"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_do_not_depend_on_the_batch(mode: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for sizes in ((4, 64, 64, 2), (17, 63, 256, 3), (300, 70)):
        weights, biases = make_net(sizes)
        rows = 400 if mode == "auto" else 70
        x = torch.randn(rows, sizes[0])
        with kernels.force(mode), torch.no_grad():
            whole = kernels.mlp(x, weights, biases, "tanh", dtype=dtype)
            for _ in range(4):
                cuts = sorted(torch.randint(1, rows, (5,), generator=generator).unique().tolist())
                parts = [
                    kernels.mlp(part.clone(), weights, biases, "tanh", dtype=dtype) for part in x.tensor_split(cuts)
                ]
                assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_results_do_not_depend_on_threads(dtype: str) -> None:
    weights, biases = make_net((40, 256, 200, 3), members=2)
    x = torch.randn(700, 40, requires_grad=True)
    single = run("auto", x, weights, biases, "silu", dtype=dtype)
    try:
        kernels.set_num_threads(3)
        several = run("auto", x, weights, biases, "silu", dtype=dtype)
    finally:
        kernels.set_num_threads(1)
    for a, b in zip(single, several, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_naive_gradient_matches_finite_differences(activation: str) -> None:
    weights, biases = make_net((3, 5, 2))
    inputs = [t.detach().double().requires_grad_() for t in (torch.randn(4, 3), *weights, *biases)]

    def loss(x: Tensor, w0: Tensor, w1: Tensor, b0: Tensor, b1: Tensor) -> Tensor:
        return kernels.mlp(x, [w0, w1], [b0, b1], activation)

    with kernels.force("naive"):
        assert torch.autograd.gradcheck(loss, inputs)


def test_traceable_equals_naive_closely() -> None:
    weights, biases = make_net((3, 17, 5))
    x = torch.randn(9, 3, requires_grad=True)
    assert_close(
        run("traceable", x, weights, biases, "tanh", dtype="fp32"),
        run("naive", x, weights, biases, "tanh", dtype="fp32"),
        1e-5,
    )


def test_frozen_weights_get_no_gradient_but_pass_it_on() -> None:
    weights, biases = make_net((3, 8, 1))
    frozen = [w.detach() for w in weights], [b.detach() for b in biases]
    x = torch.randn(6, 3, requires_grad=True)
    (through,) = torch.autograd.grad(kernels.mlp(x, *frozen, "tanh").sum(), [x])
    (full,) = torch.autograd.grad(kernels.mlp(x, weights, biases, "tanh").sum(), [x])
    assert torch.equal(through, full)


def test_no_biases_and_extra_leading_dimensions() -> None:
    weights, biases = make_net((3, 8, 2))
    zeros = [torch.zeros_like(b) for b in biases]
    x = torch.randn(4, 5, 3)
    y = kernels.mlp(x, weights, None, "relu")
    assert y.shape == (4, 5, 2)
    assert torch.equal(y.view(20, 2), kernels.mlp(x.view(20, 3), weights, zeros, "relu"))


def test_zero_rows_give_zero_gradients() -> None:
    weights, biases = make_net((3, 8, 2))
    x = torch.empty(0, 3, requires_grad=True)
    y = kernels.mlp(x, weights, biases, "tanh")
    assert y.shape == (0, 2)
    y.sum().backward()
    for p in (*weights, *biases):
        assert p.grad is not None
        assert torch.equal(p.grad, torch.zeros_like(p))


def test_replaced_parameters_are_seen() -> None:
    weights, biases = make_net((3, 8, 2))
    x = torch.randn(4, 3)
    kernels.mlp(x, weights, biases, "relu")
    weights[0].data = torch.zeros(3, 8)
    weights[1].data.mul_(2.0)
    expected = torch.relu(biases[0]).expand(4, 8) @ weights[1] + biases[1]
    torch.testing.assert_close(kernels.mlp(x, weights, biases, "relu"), expected)


def test_extreme_inputs_stay_finite_and_nan_shows() -> None:
    x = torch.tensor([[1e4], [-1e4], [float("inf")], [float("nan")]])
    one = [torch.ones(1, 1)]
    for activation in ("tanh", "sigmoid", "elu", "relu", "silu", "gelu"):
        y = kernels.mlp(x, one, None, "none", activation).view(-1)
        assert torch.isfinite(y[:2]).all(), activation
        assert torch.isnan(y[3]), activation


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "elu", "silu", "gelu"])
def test_activations_are_accurate(activation: str) -> None:
    x = torch.cat([torch.linspace(-30, 30, 20001), torch.logspace(-10, 0, 2001), -torch.logspace(-10, 0, 2001)])
    fast = kernels.mlp(x.view(-1, 1), [torch.ones(1, 1)], None, "none", activation).view(-1)
    with kernels.force("naive"):
        exact = kernels.mlp(x.double().view(-1, 1), [torch.ones(1, 1).double()], None, "none", activation).view(-1)
    # gelu's left tail is 1 + tanh near -1: cancellation leaves an absolute error there.
    bound = 4e-7 * exact.abs() + (3e-6 if activation == "gelu" else 2e-10)
    assert bool(((fast.double() - exact).abs() <= bound).all())


def test_second_derivative_is_refused() -> None:
    weights, biases = make_net((3, 8, 1))
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(InputError, match="naive"):
        torch.autograd.grad(kernels.mlp(x, weights, biases, "tanh").sum(), [x], create_graph=True)


def test_errors_name_the_part() -> None:
    weights, biases = make_net((3, 8, 2))
    with pytest.raises(InputError, match="4 features"):
        kernels.mlp(torch.zeros(1, 4), weights, biases, "tanh")
    with pytest.raises(ConfigError, match="did you mean 'tanh'"):
        kernels.mlp(torch.zeros(1, 3), weights, biases, "tanhh")
    with pytest.raises(ConfigError, match="fp32"):
        kernels.mlp(torch.zeros(1, 3), weights, biases, "tanh", dtype="fp16")
    with pytest.raises(InputError, match="input"):
        kernels.mlp(torch.zeros(1, 3), [weights[0], weights[0]], biases, "tanh")
