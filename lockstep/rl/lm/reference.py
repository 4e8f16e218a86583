"""The policy that a KL penalty pulls to: the model as it was when reinforcement began."""

from __future__ import annotations

import copy
from typing import Any

from lockstep.learn.optimiser import load_parameters
from lockstep.models.language import LanguageModel


class Reference:
    """A frozen copy of a model. Part of a run's state: a supervised start cannot be had again from the weights of later."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_parameters(dict(self.model.named_parameters()), state)
