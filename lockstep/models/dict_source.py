"""Tensors that are already in memory, read as if they lay in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lockstep.core.errors import InputError


class DictSource:
    """Tensors that are already in memory, as a `TensorSource`: a checkpoint under another name, a test, an update."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> None:
        self.tensors = dict(tensors)
        self.values = dict(config or {})

    def config(self) -> dict[str, Any]:
        """The config.json given."""
        return dict(self.values)

    def generation_config(self) -> dict[str, Any]:
        """None."""
        return {}

    def names(self) -> list[str]:
        """In the order given."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self.tensor(name).shape)

    def tensor(self, name: str) -> Tensor:
        """The tensor itself."""
        if name not in self.tensors:
            raise InputError(f"there is no tensor {name!r}", field="name")
        return self.tensors[name]

    def quantised(self, name: str) -> None:
        """Nothing here is quantised."""
        return

    def tokenizer(self) -> dict[str, Any]:
        """None."""
        return {}
