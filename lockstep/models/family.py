"""What a family's folder offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.core.shards import ShardSpec
from lockstep.layers.projection import Precision
from lockstep.models.language import LanguageModel
from lockstep.models.sizes import ModelSizes
from lockstep.models.weight_table import WeightTable


@dataclass(frozen=True)
class Family:
    """The four files of a family's folder."""

    read_config: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, Precision], LanguageModel]
    table: Callable[[Any], WeightTable]
    sizes: Callable[[Any], ModelSizes]
    shards: Callable[[Any], dict[str, ShardSpec]]
    published: dict[str, dict[str, Any]]
    """By name, a config.json of the released sizes."""
