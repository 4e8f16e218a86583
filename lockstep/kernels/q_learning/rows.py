"""What a minibatch is picked from. Legend: R rows, D features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TransitionRows:
    """What a minibatch is picked from: features and next_features [R, D] float32, action [R] int64 or [R, A] float32,
    reward [R] float32, discount [R] float32 (what the bootstrap value is multiplied by, 0 after a termination)."""

    features: Tensor
    action: Tensor
    reward: Tensor
    next_features: Tensor
    discount: Tensor
