"""Diagonal-normal heads as operators of a saved `torch.export` program; see `lockstep.kernels.mlp.opaque`.

Legend: M rows, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.kernels import native
from lockstep.kernels.gaussian import cpu, naive


def _run_evaluate(mean_MA: Tensor, log_std: Tensor, actions_MA: Tensor) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = (cpu if native.usable() else naive).evaluate(mean_MA, log_std, actions_MA)
    return out


def _run_sample(mean_MA: Tensor, log_std: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = (cpu if native.usable() else naive).sample(mean_MA, log_std, normal_MA)
    return out


def _run_squashed(mean_MA: Tensor, log_std_MA: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = (cpu if native.usable() else naive).squashed_sample(mean_MA, log_std_MA, normal_MA)
    return out


def _define(name: str, run: Callable[..., tuple[Tensor, Tensor]], last: str) -> Any:
    schema = f"(Tensor mean, Tensor log_std, {last}) -> (Tensor, Tensor)"
    return torch.library.custom_op(f"lockstep::{name}", run, mutates_args=(), schema=schema)


_evaluate = _define("gaussian_evaluate", _run_evaluate, "Tensor actions")
_sample = _define("gaussian_sample", _run_sample, "Tensor? normal")
_squashed = _define("squashed_gaussian_sample", _run_squashed, "Tensor? normal")


@_evaluate.register_fake  # type: ignore[untyped-decorator]
def _evaluate_shape(mean_MA: Tensor, log_std: Tensor, actions_MA: Tensor) -> tuple[Tensor, Tensor]:
    return mean_MA.new_empty(mean_MA.shape[0]), mean_MA.new_empty(mean_MA.shape[0])


@_sample.register_fake  # type: ignore[untyped-decorator]
@_squashed.register_fake  # type: ignore[untyped-decorator]
def _sample_shape(mean_MA: Tensor, log_std: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    return mean_MA.new_empty(mean_MA.shape), mean_MA.new_empty(mean_MA.shape[0])


def evaluate(mean_MA: Tensor, log_std: Tensor, actions_MA: Tensor) -> tuple[Tensor, Tensor]:
    """(logprob_M, entropy_M)."""
    out: tuple[Tensor, Tensor] = _evaluate(mean_MA, log_std, actions_MA)
    return out


def sample(mean_MA: Tensor, log_std: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    """(actions_MA, logprob_M)."""
    out: tuple[Tensor, Tensor] = _sample(mean_MA, log_std, normal_MA)
    return out


def squashed_sample(mean_MA: Tensor, log_std_MA: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    """(actions_MA, logprob_M) of tanh(mean + std * normal)."""
    out: tuple[Tensor, Tensor] = _squashed(mean_MA, log_std_MA, normal_MA)
    return out
