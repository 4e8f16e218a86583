"""Training an adapter in the stead of a model: its configuration, and the model that both become."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lockstep.core.errors import ConfigError
from lockstep.interop.hf.peft import save_adapter
from lockstep.layers.low_rank import Adapter
from lockstep.learn.learner import Weights
from lockstep.learn.model import TrainedModel
from lockstep.models.adapter import ALL_TARGETS, LoraConfig, merge_adapter, new_adapter
from lockstep.models.language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A low-rank adapter to train (Hu et al. 2021); the model stays as it is."""

    rank: int = 0
    """Of every pair (0: no adapter, all weights are trained)."""
    alpha: float = 32.0
    """The pair's product is scaled by alpha / rank."""
    targets: tuple[str, ...] = ALL_TARGETS
    """Matrices: qkv, out, gate_up, up, down, or last words of the checkpoint's names."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"adapter rank={self.rank}; expected 0 (none) or more")

    def check(self, path: str) -> None:
        """Refuse an adapter beside weights that nobody has trained.

        Args:
            path: of the model (empty: a new one).

        Raises:
            ConfigError: the model is new.
        """
        if self.rank and not path:
            raise ConfigError(
                f"adapter.rank={self.rank} of a new model, whose weights would stay as they were drawn; give model.path, or "
                "train all weights by adapter.rank=0"
            )

    def build(self, model: LanguageModel, seed: int) -> Adapter | None:
        """One that changes nothing yet; None where there is none.

        Raises:
            ConfigError: a target that the model has not.
        """
        if self.rank == 0:
            return None
        wish = LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.targets)
        return new_adapter(model, wish, torch.Generator().manual_seed(seed))


def frozen_parts(model: LanguageModel, adapter: Adapter | None) -> dict[str, LanguageModel]:
    """What a checkpoint needs beside a learner: the model that it does not change and a resumed process must find again."""
    return {} if adapter is None else {"frozen": model}


def melted(weights: Weights) -> LanguageModel:
    """The model with its adapter in its weights: a copy where there is one."""
    if weights.adapter is None:
        return weights.model
    model = copy.deepcopy(weights.model)
    merge_adapter(model, weights.adapter)
    return model


def write_weights(made: TrainedModel, weights: Weights, folder: Path, results: Mapping[str, Any]) -> None:
    """The model's folder. An adapter is melted into a copy of the weights, and lies alone beside it, as PEFT keeps it: in
    "adapter" beside "model"."""
    if weights.adapter is not None:
        save_adapter(weights.adapter, folder.with_name(folder.name.replace("model", "adapter")))
    replace(made, model=melted(weights)).write(folder, results, folder.parent.name)
