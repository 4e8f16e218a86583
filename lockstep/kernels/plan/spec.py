"""What an act consists of: networks, a head and an observation normaliser, by reference to the module's own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

HEADS = ("categorical", "gaussian", "squashed", "tanh", "argmax")


@dataclass(frozen=True)
class Net:
    """A dense chain; arguments as in `lockstep.kernels.mlp`."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    activation: str
    output_activation: str = "none"
    dtype: str = "fp32"


@dataclass(frozen=True)
class Head:
    """How the actor's output becomes an action.

    categorical: logits of one choice, or of the choices `nvec` side by side.
    gaussian: means; `log_std` [A] is a parameter.
    squashed: means, then log standard deviations, which are clamped to [log_std_min, log_std_max].
    tanh: the output is the action (a deterministic policy whose chain ends in tanh); noise is the caller's.
    argmax: Q-values; the best one, or with chance `epsilon` a uniform one. Two uniforms a row: the coin, the choice.
    """

    kind: Literal["categorical", "gaussian", "squashed", "tanh", "argmax"]
    nvec: tuple[int, ...] | None = None
    log_std: Tensor | None = None
    log_std_min: float = -20.0
    log_std_max: float = 2.0
    epsilon: float = 0.0


@dataclass(frozen=True)
class Normaliser:
    """clip((x - mean) * inv_std, -clip, clip); tensors [D] float32 that may change in place."""

    mean: Tensor
    inv_std: Tensor
    clip: float
