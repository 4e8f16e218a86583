"""The categorical head as operators of a saved `torch.export` program; see `lockstep.kernels.mlp.opaque`.

Legend: M rows, A logits of all blocks together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lockstep.kernels import native
from lockstep.kernels.categorical import cpu, naive


def _run_evaluate(logits_MA: Tensor, actions: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = (cpu if native.usable() else naive).evaluate(logits_MA, actions, tuple(sizes))
    return out


def _run_sample(logits_MA: Tensor, uniform_MA: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = (cpu if native.usable() else naive).sample(logits_MA, uniform_MA, tuple(sizes))
    return out


_evaluate = torch.library.custom_op(
    "lockstep::categorical_evaluate",
    _run_evaluate,
    mutates_args=(),
    schema="(Tensor logits, Tensor actions, int[] sizes) -> (Tensor, Tensor)",
)
_sample = torch.library.custom_op(
    "lockstep::categorical_sample",
    _run_sample,
    mutates_args=(),
    schema="(Tensor logits, Tensor? uniform, int[] sizes) -> (Tensor, Tensor)",
)


@_evaluate.register_fake
def _evaluate_shape(logits_MA: Tensor, actions: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    return logits_MA.new_empty(logits_MA.shape[0]), logits_MA.new_empty(logits_MA.shape[0])


@_sample.register_fake
def _sample_shape(logits_MA: Tensor, uniform_MA: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    num = logits_MA.shape[0]
    return logits_MA.new_empty((num, len(sizes)), dtype=torch.int64), logits_MA.new_empty(num)


def evaluate(logits_MA: Tensor, actions: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(logprob_M, entropy_M), summed over blocks."""
    out: tuple[Tensor, Tensor] = _evaluate(logits_MA, actions, list(sizes))
    return out


def sample(logits_MA: Tensor, uniform_MA: Tensor | None, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(actions [M, blocks], logprob_M) by Gumbel-max; no uniforms: the mode."""
    out: tuple[Tensor, Tensor] = _sample(logits_MA, uniform_MA, list(sizes))
    return out
