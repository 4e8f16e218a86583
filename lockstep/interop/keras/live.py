"""A model of Keras that is an object in this process, of any backend: as what it would save."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError, FormatError
from lockstep.interop.keras.reader import read_keras
from lockstep.models.graph.module import GraphModule


def is_keras_model(value: Any) -> bool:
    """Whether an object is a model of Keras; Keras is not imported for it.

    >>> is_keras_model(3)
    False
    """
    kinds = type(value).__mro__
    return any(kind.__module__.startswith("keras.") and kind.__name__ == "Model" for kind in kinds)


def from_keras(model: Any) -> GraphModule:
    """The network as ours, with its weights; `save_keras` writes tuned ones as a file that Keras opens.

    Raises:
        ConfigError: it is not built yet (give it an `Input`), or Keras cannot save it.
        FormatError: a layer that is code.
    """
    if not model.built:
        raise ConfigError("the Keras model does not know its input yet; begin it with keras.Input((4,)), or build() it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        try:
            model.save(path)
        except Exception as error:  # Keras' errors have no common root
            raise ConfigError(f"Keras cannot save the model: {str(error)[:300]}") from error
        try:
            return read_keras(path)
        except FormatError as error:
            raise FormatError(error.reason, path=str(model.name), op=error.op) from error
