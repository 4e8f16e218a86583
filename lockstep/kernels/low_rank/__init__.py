"""What low-rank adapters add to a product with a large matrix (Hu et al. 2021), for rows of many adapters in one call.

Legend: M rows, K inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lockstep.core.adapters import LowRankPair
from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.low_rank import cpu, naive
from lockstep.kernels.low_rank.trained import TrainedLowRank

IMPLEMENTATIONS = {"naive": naive, "cpu": cpu, "opaque": naive}

__all__ = ["LowRankRun", "add_low_rank", "check_runs"]


@dataclass(frozen=True, slots=True, eq=False)
class LowRankRun:
    """Rows first_row .. last_row - 1 take this pair."""

    first_row: int
    last_row: int
    pair: LowRankPair


def add_low_rank(y_MN: Tensor, x_MK: Tensor, runs: Sequence[LowRankRun]) -> Tensor:
    """y[rows, columns] += scale * (x[rows] a) b for every run, in place.

    h[j] = scale * (chain of fused multiply-adds over rising k that starts at 0); then y[n] goes on as a chain over rising
    j: y = fma(h[j], b[j, n], y). So a row's bits depend on that row and its own adapter only.

    Args:
        y_MN: float32 contiguous, the product with the base matrix; it is overwritten, also where gradients are recorded.
        x_MK: float32, what was multiplied.
        runs: a row and column are in one run at most.

    Returns:
        y, differentiable with respect to y, x, and every pair's a and b.

    Raises:
        InputError: shapes or dtypes that do not fit, rows outside of x, runs that overlap.
    """
    if not runs:
        return y_MN
    _check(y_MN, x_MK, runs)
    implementation = IMPLEMENTATIONS[native.choose(x_MK)]
    if torch.is_grad_enabled():
        pairs = [tensor for run in runs for tensor in (run.pair.a_KR, run.pair.b_RN)]
        if y_MN.requires_grad or x_MK.requires_grad or any(tensor.requires_grad for tensor in pairs):
            out: Tensor = TrainedLowRank.apply(y_MN, x_MK, runs, implementation.add, *pairs)  # type: ignore[no-untyped-call]
            return out
    implementation.add(y_MN, x_MK, runs)
    return y_MN


def _check(y_MN: Tensor, x_MK: Tensor, runs: Sequence[LowRankRun]) -> None:
    num_rows, num_inputs = x_MK.shape
    if y_MN.shape[0] != num_rows or y_MN.dtype != torch.float32 or not y_MN.is_contiguous():
        raise InputError(
            f"y is {y_MN.dtype} {list(y_MN.shape)}; expected float32 [{num_rows}, outputs], contiguous", field="y"
        )
    check_runs(runs, num_rows, num_inputs, y_MN.shape[1], x_MK.device)


def check_runs(
    runs: Sequence[LowRankRun], num_rows: int, num_inputs: int, num_outputs: int, device: torch.device
) -> None:
    """Raises InputError for what `add_low_rank` would refuse of runs over a product of this size."""
    for run in runs:
        a_KR, b_RN = run.pair.a_KR, run.pair.b_RN
        first, last = run.pair.first_column, run.pair.first_column + b_RN.shape[-1]
        if a_KR.shape != (num_inputs, b_RN.shape[0]) or not 0 <= first < last <= num_outputs or b_RN.shape[0] == 0:
            raise InputError(
                f"an adapter of a {list(a_KR.shape)}, b {list(b_RN.shape)} at column {first} meets a matrix of "
                f"{num_inputs} inputs and {num_outputs} outputs; is it another model's?",
                field="adapter",
            )
        for tensor in (a_KR, b_RN):
            if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device != device:
                raise InputError(
                    f"an adapter's tensor is {tensor.dtype} on {tensor.device}; expected float32, contiguous, on "
                    f"{device}",
                    field="adapter",
                )
        if not 0 <= run.first_row <= run.last_row <= num_rows:
            raise InputError(f"a run of rows {run.first_row}..{run.last_row} of {num_rows}", field="runs")
    taken = sorted((r.pair.first_column, r.first_row, r.last_row) for r in runs if r.first_row < r.last_row)
    for before, after in pairwise(taken):
        if before[0] == after[0] and before[2] > after[1]:
            raise InputError(f"rows {after[1]}.. of column {after[0]} are in two runs", field="runs")
