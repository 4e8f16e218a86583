"""Packed products in training: bits of the serving kernel, gradients of the plain product.

Legend: M rows, N outputs, K inputs, X experts.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels.packed_linear import (
    grouped_linear,
    pack,
    packed_linear,
    stack,
    trained_grouped_linear,
    trained_linear,
    unpack,
)

SIZES = [(1, 1, 1), (7, 63, 17), (33, 130, 96), (64, 5, 1000)]
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.detach().abs().max()) + 1e-6
    assert float((got - expected).detach().abs().max()) <= tolerance * scale


@pytest.mark.parametrize("mode", ["auto", "naive"])
@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize(("num_rows", "num_outputs", "num_inputs"), SIZES)
def test_gradients_of_floats(mode: str, format: str, num_rows: int, num_outputs: int, num_inputs: int) -> None:
    x, weight, bias = leaf(num_rows, num_inputs), leaf(num_outputs, num_inputs), leaf(num_outputs)
    dy = torch.randn(num_rows, num_outputs)
    with kernels.force(mode):
        packed = pack(weight, format)
        y = trained_linear(x, weight, packed, bias)
        assert torch.equal(y, packed_linear(x, packed, bias))
        grads = torch.autograd.grad(y, [x, weight, bias], dy)
    expected = torch.autograd.grad(x @ weight.T + bias, [x, weight, bias], dy)
    for got, wanted in zip(grads, expected, strict=True):
        assert got.dtype is wanted.dtype
        close(got, wanted, TOLERANCE[format])


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_finite_differences(format: str) -> None:
    """The gradient predicts what the kernel itself does when an argument moves; the product is linear in each."""
    x, weight, bias = leaf(3, 24), leaf(5, 24), leaf(5)
    dy = torch.randn(3, 5)
    grads = torch.autograd.grad(trained_linear(x, weight, pack(weight, format), bias), [x, weight, bias], dy)
    for index, grad in enumerate(grads):
        moved = [t.detach().clone() for t in (x, weight, bias)]
        step = torch.randn_like(moved[index])
        before = packed_linear(moved[0], pack(moved[1], format), moved[2])
        moved[index] += step
        after = packed_linear(moved[0], pack(moved[1], format), moved[2])
        found, predicted = float(((after - before) * dy).sum()), float((grad * step).sum())
        assert found == pytest.approx(predicted, rel=1e-3 if format == "fp32" else 0.1, abs=0.1)


def test_bf16_weight_keeps_its_dtype() -> None:
    x, weight = leaf(6, 40), torch.randn(9, 40).bfloat16().requires_grad_()
    y = trained_linear(x, weight, pack(weight, "bf16"))
    dx, dweight = torch.autograd.grad(y.sum(), [x, weight])
    assert dx.dtype is torch.float32
    assert dweight.dtype is torch.bfloat16
    close(dx, weight.float().sum(0).expand(6, 40), 1e-2)
    close(dweight.float(), x.detach().sum(0).expand(9, 40), 2e-2)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("num_outputs", [17, 4100])
def test_quantised_base_passes_the_gradient_through(format: str, num_outputs: int) -> None:
    """More outputs than the backward pass spells out at once, and fewer."""
    base, x, dy = torch.randn(num_outputs, 64), leaf(5, 64), torch.randn(5, num_outputs)
    packed = pack(base, format)
    y = trained_linear(x, None, packed)
    assert torch.equal(y, packed_linear(x, packed))
    (dx,) = torch.autograd.grad(y, [x], dy)
    close(dx, dy @ unpack(packed), 1e-5)
    with pytest.raises(ConfigError, match="integers have none"):
        trained_linear(x, base.clone().requires_grad_(), packed)


@pytest.mark.parametrize("mode", ["auto", "naive"])
@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_grouped_equals_each(mode: str, format: str) -> None:
    """Experts with no rows, the first and the last among them, have gradients of zero."""
    starts = torch.tensor([0, 0, 3, 4, 20, 20])
    x, weight, bias = leaf(20, 33), leaf(5, 9, 33), leaf(5, 9)
    dy = torch.randn(20, 9)
    with kernels.force(mode):
        experts = [pack(w, format) for w in weight]
        for packed in (experts, stack(experts)):
            y = trained_grouped_linear(x, weight, packed, starts, bias)
            assert torch.equal(y, grouped_linear(x, packed, starts, bias))
            grads = torch.autograd.grad(y, [x, weight, bias], dy)
            parts = [
                trained_linear(x[a:b], weight[i], experts[i], bias[i])
                for i, (a, b) in enumerate(pairwise(starts.tolist()))
            ]
            assert torch.equal(torch.cat(parts), y)
            expected = torch.autograd.grad(torch.cat(parts), [x, weight, bias], dy)
            for got, wanted in zip(grads, expected, strict=True):
                close(got, wanted, TOLERANCE[format])


def test_errors() -> None:
    x, weight = torch.randn(4, 32), torch.randn(8, 32)
    packed = pack(weight, "fp32")
    with pytest.raises(InputError, match="weight is"):
        trained_linear(x, weight.T, packed)
    with pytest.raises(InputError, match="weight is"):
        trained_linear(x, weight.double(), packed)
    with pytest.raises(InputError, match="x is"):
        trained_linear(x.double(), weight, packed)
    with pytest.raises(InputError, match="use grouped_linear"):
        trained_linear(x, None, stack([packed]))
