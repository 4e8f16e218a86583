"""Low-rank additions: fast against naive, forward and gradient, on every level; a row's bits depend on the row alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.adapters import LowRankPair
from lockstep.core.errors import InputError
from lockstep.kernels.low_rank import LowRankRun, add_low_rank

SHAPES = ((1, 63, 1, 7), (5, 96, 3, 64), (37, 64, 16, 130), (70, 33, 20, 1000))
"""Rows, inputs, rank, outputs."""


def pair(num_inputs: int, rank: int, num_outputs: int, first_column: int = 0, scale: float = 0.7) -> LowRankPair:
    a, b = torch.randn(num_inputs, rank), torch.randn(rank, num_outputs)
    return LowRankPair(a.requires_grad_(), b.requires_grad_(), scale, first_column)


def added(y: Tensor, x: Tensor, runs: list[LowRankRun]) -> Tensor:
    return add_low_rank(y.clone(), x, runs)


def parts(rows: int, num_inputs: int, rank: int, num_outputs: int) -> tuple[Tensor, Tensor, list[LowRankRun]]:
    """Two adapters on two parts of the output, some rows with none."""
    x, y = torch.randn(rows, num_inputs), torch.randn(rows, 2 * num_outputs + 3)
    split = max(1, rows // 3)
    runs = []
    for first, last in ((0, split), (split, max(split, rows - 1))):
        runs += [LowRankRun(first, last, pair(num_inputs, rank, num_outputs, at)) for at in (0, num_outputs + 3)]
    return x.requires_grad_(), y.requires_grad_(), runs


@pytest.mark.parametrize("shape", SHAPES)
def test_every_level_equals_naive(level: int, shape: tuple[int, int, int, int]) -> None:
    x, y, runs = parts(*shape)
    leaves = [x, y, *(tensor for run in runs for tensor in (run.pair.a_KR, run.pair.b_RN))]
    results = []
    for mode in ("auto", "naive"):
        with kernels.force(mode):  # type: ignore[arg-type]
            out = added(y, x, runs)
            weight = torch.linspace(-1.0, 2.0, out.numel()).view_as(out)
            results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    # The portable build's multiply-add rounds twice.
    exact = level > 0
    for index, (fast, slow) in enumerate(zip(*results, strict=True)):
        if index == 0 and exact:
            assert torch.equal(fast, slow)
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_plain_matrix_products() -> None:
    x, y, runs = parts(9, 40, 5, 30)
    leaves = [x, y, *(tensor for run in runs for tensor in (run.pair.a_KR, run.pair.b_RN))]
    expected = y.clone()
    for run in runs:
        low, wide = run.pair, run.pair.b_RN.shape[1]
        part = low.scale * (x[run.first_row : run.last_row] @ low.a_KR @ low.b_RN)
        full = torch.zeros_like(y)
        full[run.first_row : run.last_row, low.first_column : low.first_column + wide] = part
        expected = expected + full
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((added(y, x, runs) * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_a_row_depends_on_itself_and_its_adapter_alone(level: int, mode: str) -> None:
    rng = random.Random(0)
    adapters = [pair(80, rank, 600) for rank in (1, 8, 17)]
    x, y = torch.randn(90, 80), torch.randn(90, 600)
    with kernels.force(mode), torch.no_grad():  # type: ignore[arg-type]
        alone = [added(y, x, [LowRankRun(0, 90, adapter)]) for adapter in adapters]
        for _ in range(8 if mode == "auto" else 2):
            runs, expected, row = [], y.clone(), 0
            while row < 90:
                last = min(90, row + rng.randrange(1, 40))
                which = rng.randrange(-1, 3)
                if which >= 0:
                    runs.append(LowRankRun(row, last, adapters[which]))
                    expected[row:last] = alone[which][row:last]
                row = last
            assert torch.equal(added(y, x, runs), expected)


def test_threads_and_gradients_do_not_change_bits() -> None:
    x, y, runs = parts(300, 200, 16, 1500)
    before = kernels.num_threads()
    try:
        results = [added(y, x, runs).detach()]
        for threads in (1, 2):
            kernels.set_num_threads(threads)
            with torch.no_grad():
                results.append(added(y, x, runs))
    finally:
        kernels.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_wrong_inputs() -> None:
    x, y = torch.zeros(4, 8), torch.zeros(4, 10)
    assert add_low_rank(y, x, []) is y
    with pytest.raises(InputError, match="another model's"):
        added(y, x, [LowRankRun(0, 4, pair(9, 2, 10))])
    with pytest.raises(InputError, match="another model's"):
        added(y, x, [LowRankRun(0, 4, pair(8, 2, 10, first_column=1))])
    with pytest.raises(InputError, match=r"rows 0\.\.5 of 4"):
        added(y, x, [LowRankRun(0, 5, pair(8, 2, 10))])
    with pytest.raises(InputError, match="in two runs"):
        added(y, x, [LowRankRun(0, 3, pair(8, 2, 10)), LowRankRun(2, 4, pair(8, 2, 10))])
    with pytest.raises(InputError, match="contiguous"):
        added(y, x, [LowRankRun(0, 4, LowRankPair(torch.zeros(2, 8).T, torch.zeros(2, 10), 1.0))])
    with pytest.raises(InputError, match="y is"):
        add_low_rank(y.double(), x, [LowRankRun(0, 4, pair(8, 2, 10))])
