"""Activations of feed-forward layers: fast against naive, forward and gradient, on every level."""

from __future__ import annotations

import pytest
import torch

from lockstep import kernels
from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels.activation import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_equals_naive(level: int, kind: str) -> None:
    edges = torch.tensor([0.0, -0.0, 90.0, -90.0, 5.0, -5.0, 1e-20, -1e4])
    for width in (1, 5, 63, 64, 1000):
        x = (torch.randn(9, 2 * width) * 3).requires_grad_()
        flat = torch.cat([edges, torch.linspace(-9.0, 9.0, width)]).requires_grad_()
        results = []
        for mode in ("auto", "naive"):
            with kernels.force(mode):  # type: ignore[arg-type]
                y, z = kernels.gated(x, kind), kernels.activate(flat, kind)
                grads = torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), x)
                results.append([y, z, *grads, *torch.autograd.grad(z.sum(), flat)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "relu"])
def test_gradient_matches_finite_differences(kind: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (kernels.gated(x, kind), kernels.activate(x, kind)), x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_itself_alone(level: int, kind: str) -> None:
    x = torch.randn(80, 2 * 515)
    whole, plain = kernels.gated(x, kind), kernels.activate(x, kind)
    for cut in (1, 33):
        assert torch.equal(torch.cat([kernels.gated(part, kind) for part in x.split(cut)]), whole)
        assert torch.equal(torch.cat([kernels.activate(part, kind) for part in x.split(cut)]), plain)


def test_threads_do_not_change_bits() -> None:
    x = torch.randn(200, 2 * 515)
    before = kernels.num_threads()
    try:
        results = []
        for threads in (1, 2):
            kernels.set_num_threads(threads)
            results.append((kernels.gated(x, "silu"), kernels.activate(x, "gelu")))
    finally:
        kernels.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_inputs() -> None:
    with pytest.raises(ConfigError, match="did you mean 'silu'"):
        kernels.gated(torch.zeros(1, 2), "sillu")
    with pytest.raises(ConfigError, match="unknown activation"):
        kernels.activate(torch.zeros(1, 2), "swish2")
    with pytest.raises(InputError, match="even"):
        kernels.gated(torch.zeros(1, 3), "silu")
