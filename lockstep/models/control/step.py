"""The result of one decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class PolicyStep:
    """What one decision yields, N rows each. `features` is the network input the learner trains on, `action` is in the
    head's own coordinates, `env_action` is what the environment gets.

    >>> import torch
    >>> PolicyStep(torch.zeros(1), torch.zeros(1), torch.zeros(1), None, torch.zeros(1), {}).value is None
    True
    """

    action: Tensor
    env_action: Tensor
    logprob: Tensor
    value: Tensor | None
    features: Any
    state: dict[str, Tensor]
