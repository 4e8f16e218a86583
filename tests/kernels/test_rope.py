"""Rotary embedding: the bits of its twin, gradients, positions and views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import InputError


def tables(rows: int, pairs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angle = torch.arange(rows).unsqueeze(1) * 10000.0 ** -(torch.arange(pairs) / max(pairs, 1))
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_level_has_the_bits_of_the_twin(level: int, interleaved: bool) -> None:
    for dim, pairs in ((2, 1), (8, 3), (20, 10), (64, 32), (96, 16), (256, 128)):
        cos, sin = tables(50, pairs)
        x, positions = torch.randn(33, 3, dim, requires_grad=True), torch.randint(0, 50, (33,))
        grad = torch.randn(33, 3, dim)
        results = []
        for mode in ("auto", "naive"):
            with kernels.force(mode):  # type: ignore[arg-type]
                y = kernels.rope(x, positions, cos, sin, interleaved)
                results.append((y, *torch.autograd.grad(y, x, grad)))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_matches_finite_differences(interleaved: bool) -> None:
    cos, sin = tables(9, 2, torch.float64)
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 8, 3])
    assert torch.autograd.gradcheck(lambda x: kernels.rope(x, positions, cos, sin, interleaved), x)


def test_a_token_depends_on_itself_and_its_position_and_views_are_read_in_place(level: int) -> None:
    cos, sin = tables(4096, 32)
    joint, positions = torch.randn(300, 4 * 64 + 100), torch.randint(0, 4096, (300,))
    x = joint[:, 50 : 50 + 4 * 64].view(300, 4, 64)
    whole = kernels.rope(x.contiguous(), positions, cos, sin)
    assert torch.equal(kernels.rope(x, positions, cos, sin), whole)
    for cut in (1, 77):
        parts = [kernels.rope(a, p, cos, sin) for a, p in zip(x.split(cut), positions.split(cut), strict=True)]
        assert torch.equal(torch.cat(parts), whole)


def test_scores_depend_on_the_distance_only() -> None:
    cos, sin = tables(200, 16)
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)
    score = [
        float((kernels.rope(q, torch.tensor([p + 9]), cos, sin) * kernels.rope(k, torch.tensor([p]), cos, sin)).sum())
        for p in (0, 100)
    ]
    assert score[0] == pytest.approx(score[1], abs=1e-4)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_wrong_inputs(mode: str) -> None:
    cos, sin = tables(5, 2)
    x = torch.zeros(2, 1, 4)
    with kernels.force(mode):  # type: ignore[arg-type]
        for position in (-1, 5):
            with pytest.raises(InputError, match=r"positions\[1\] is"):
                kernels.rope(x, torch.tensor([0, position]), cos, sin)
        with pytest.raises(InputError, match="2R <= D"):
            kernels.rope(x[..., :2], torch.tensor([0, 1]), cos, sin)
        with pytest.raises(InputError, match="positions are"):
            kernels.rope(x, torch.tensor([0.0, 1.0]), cos, sin)
        with pytest.raises(InputError, match="tables are"):
            kernels.rope(x, torch.tensor([0, 1]), cos.double(), sin.double())
