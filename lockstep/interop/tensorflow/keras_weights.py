"""Weights that tf.keras wrote as a checkpoint: `model.save_weights("dqn.h5f")` of TensorFlow 2 makes `dqn.h5f.index`.

A checkpoint names variables by their path in the model: "layer_with_weights-1/kernel", with "cell/" in recurrent layers and
"forward_layer/", "backward_layer/" in bidirectional ones. What an optimiser keeps stays out.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.core.errors import FormatError
from lockstep.interop.tensorflow.bundle import read_checkpoint

ENDING = "/.ATTRIBUTES/VARIABLE_VALUE"
ORDER = ("kernel", "recurrent_kernel", "gamma", "bias", "beta", "moving_mean", "moving_variance", "embeddings")
"""Of a layer's weights in Keras; gamma stands before beta, kernels before biases."""
_VARIABLE = re.compile(r"(?:(.+?)/)?layer_with_weights-(\d+)/(.+)")


class CheckpointWeights:
    """What `keras.files.KerasFile` is for a file of HDF5.

    Args:
        path: `NAME.index`, or `NAME`.
        config: of `model.to_json()`.

    Raises:
        FormatError: damaged, or no weights of a Keras model.
    """

    content = b""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.tensors = {}
        self.layers: dict[int, list[str]] = {}
        roots = set()
        for name, tensor in read_checkpoint(path).items():
            found = _VARIABLE.fullmatch(name.removesuffix(ENDING))
            if found and ".OPTIMIZER_SLOT" not in name:
                roots.add(found.group(1) or "")
                self.tensors[name] = tensor
                self.layers.setdefault(int(found.group(2)), []).append(name)
        if len(roots) != 1:
            told = f"weights of the models {sorted(roots)}" if roots else "no weights of a Keras model"
            raise FormatError(f"holds {told}; one was expected beside config=", path=str(path))

    def places(self, layers: list[dict[str, Any]], weighted: Collection[str]) -> dict[str, str]:
        """Layer's name -> its number among those with weights.

        Raises:
            FormatError: the configuration has more or fewer of them.
        """
        wanted = [str(layer["config"]["name"]) for layer in layers if layer["class_name"] in weighted]
        if sorted(self.layers) != list(range(len(wanted))):
            raise FormatError(
                f"holds weights of {len(self.layers)} layers, and the configuration has {len(wanted)}, {wanted[:4]}",
                path=str(self.path),
            )
        others = {str(layer["config"]["name"]): "" for layer in layers}
        return {**others, **{name: str(index) for index, name in enumerate(wanted)}}

    def datasets(self, group: str) -> list[str]:
        """Names of a layer's variables in Keras' order."""
        return sorted(self.layers.get(int(group), []), key=_rank) if group else []

    def array(self, name: str) -> np.ndarray:
        """One variable as float32."""
        tensor = self.tensors[name]
        if not tensor.dtype.is_floating_point:
            raise FormatError(f"variable {name!r} is {tensor.dtype}", path=str(self.path))
        return np.asarray(tensor.float().numpy())


def _rank(name: str) -> tuple[int, int]:
    last = name.removesuffix(ENDING).rpartition("/")[2]
    if last not in ORDER:
        raise FormatError(f"variable {name.removesuffix(ENDING)!r} is of no layer that is known")
    return int("/backward_layer/" in name), ORDER.index(last)
