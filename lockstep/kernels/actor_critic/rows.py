"""What a minibatch is picked from. Legend: R rows, D features, A actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class RolloutRows:
    """What a minibatch is picked from, all float32 but a discrete action.

    features [R, D]; action int64 [R] or [R, blocks], or float [R, A]; logprob [R] and value [R] of the policy that
    acted; advantage [R] (the return is advantage + value). Networks that are no dense chains may take features in another
    form, such as a dictionary with R rows in each entry.
    """

    features: Any
    action: Tensor
    logprob: Tensor
    advantage: Tensor
    value: Tensor
