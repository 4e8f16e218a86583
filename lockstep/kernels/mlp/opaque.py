"""The dense chain as one operator of a saved `torch.export` program: the program holds a call, not its arithmetic, so
that it computes the bits of this process's kernels.

Legend: M rows, K in, N out, E ensemble members.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lockstep.kernels import native
from lockstep.kernels.mlp import cpu, naive


def _run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str,
    output_activation: str,
    dtype: str,
) -> Tensor:
    function = cpu.mlp if native.usable() else naive.mlp
    out: Tensor = function(x, weights, biases, activation, output_activation, dtype)
    return out


SCHEMA = "(Tensor x, Tensor[] weights, Tensor?[] biases, str activation, str output_activation, str dtype) -> Tensor"
_op = torch.library.custom_op("lockstep::mlp", _run, mutates_args=(), schema=SCHEMA)


@_op.register_fake
def _shape(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str,
    output_activation: str,
    dtype: str,
) -> Tensor:
    width = weights[-1].shape[-1]
    if weights[0].dim() == 3:
        return x.new_empty((weights[0].shape[0], x.shape[-2], width), dtype=torch.float32)
    return x.new_empty((*x.shape[:-1], width), dtype=torch.float32)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str,
    output_activation: str,
    dtype: str,
) -> Tensor:
    """See `lockstep.kernels.mlp`."""
    out: Tensor = _op(x, list(weights), list(biases), activation, output_activation, dtype)
    return out
