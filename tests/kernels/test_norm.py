"""Norms: fast against naive, forward and gradient, on every level; a row's bits depend on the row alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import InputError

WIDTHS = (1, 3, 17, 63, 64, 130, 1000)
OPS: dict[str, Callable[..., list[Tensor]]] = {
    "rms": lambda x, r, w, b: [kernels.rms_norm(x, w, 1e-6)],
    "rms offset": lambda x, r, w, b: [kernels.rms_norm(x, w, 1e-5, offset=1.0)],
    "add rms": lambda x, r, w, b: list(kernels.add_rms_norm(x, r, w, 1e-6)),
    "layer": lambda x, r, w, b: [kernels.layer_norm(x, w, b, 1e-5)],
    "layer bare": lambda x, r, w, b: [kernels.layer_norm(x, None, None, 1e-5)],
}


def inputs(rows: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((rows, width), (rows, width), (width,), (width,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def with_gradients(op: str, tensors: list[Tensor]) -> list[Tensor | None]:
    outs = OPS[op](*tensors)
    total = sum((y * torch.linspace(-1.0, 2.0, y.numel()).view_as(y)).sum() for y in outs)
    return [*outs, *torch.autograd.grad(total, tensors, allow_unused=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("op", OPS)
def test_every_level_equals_naive(level: int, op: str) -> None:
    for width in WIDTHS:
        tensors = inputs(67, width)
        fast = with_gradients(op, tensors)
        with kernels.force("naive"):
            slow = with_gradients(op, tensors)
        for a, b in zip(fast, slow, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                # A row of one element is normalised to zero, and its gradient is a difference of equal numbers.
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 if width > 1 else 1e-2)


@pytest.mark.parametrize("op", OPS)
def test_gradient_matches_finite_differences(op: str) -> None:
    tensors = inputs(3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: tuple(OPS[op](*x)), tensors)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_a_row_depends_on_itself_alone(level: int, mode: str) -> None:
    rows = 40
    for width in (7, 64, 900):
        tensors = [x.detach() for x in inputs(rows, width)]
        with kernels.force(mode):  # type: ignore[arg-type]
            for op in OPS.values():
                whole = op(*tensors)
                for cut in (1, 13):
                    parts = [
                        op(x, r, *tensors[2:])
                        for x, r in zip(tensors[0].split(cut), tensors[1].split(cut), strict=True)
                    ]
                    for i, y in enumerate(whole):
                        assert torch.equal(torch.cat([part[i] for part in parts]), y)


def test_threads_do_not_change_bits() -> None:
    tensors = [x.detach() for x in inputs(300, 515)]
    before = kernels.num_threads()
    try:
        results = []
        for threads in (1, 2):
            kernels.set_num_threads(threads)
            results.append([y for op in OPS.values() for y in op(*tensors)])
    finally:
        kernels.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_agrees_with_torch_and_any_leading_shape() -> None:
    x, w, b = torch.randn(2, 3, 96), torch.randn(96), torch.randn(96)
    torch.testing.assert_close(kernels.rms_norm(x, w, 1e-6), torch.nn.functional.rms_norm(x, (96,), w, 1e-6))
    torch.testing.assert_close(kernels.layer_norm(x, w, b, 1e-5), torch.nn.functional.layer_norm(x, (96,), w, b, 1e-5))
    assert torch.equal(kernels.rms_norm(x[:, 1], w, 1e-6), kernels.rms_norm(x, w, 1e-6)[:, 1])
    assert kernels.rms_norm(torch.zeros(0, 96), w, 1e-6).shape == (0, 96)


def test_wrong_inputs() -> None:
    x, w = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(InputError, match="weight is"):
        kernels.rms_norm(x, torch.ones(3), 1e-6)
    with pytest.raises(InputError, match="bfloat16"):
        kernels.rms_norm(x, w.bfloat16(), 1e-6)
    with pytest.raises(InputError, match="residual is"):
        kernels.add_rms_norm(x, torch.zeros(4), w, 1e-6)
    with pytest.raises(InputError, match="bias is"):
        kernels.layer_norm(x, w, torch.ones(5), 1e-6)
