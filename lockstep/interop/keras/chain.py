"""Weights of Keras without their architecture, as one chain of dense layers and convolutions."""

from __future__ import annotations

import numpy as np
import torch

from lockstep.core.errors import FormatError
from lockstep.interop.chains import Layer, chain, image_layout
from lockstep.interop.keras.files import KerasFile
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About
from lockstep.models.graph.module import GraphModule


def read_chain(file: KerasFile, activation: str) -> GraphModule:
    """The layers in the file's order with `activation` between them.

    Raises:
        FormatError: a layer that is neither dense nor a convolution, or layers that do not follow each other.
    """
    make = GraphBuilder()
    try:
        layers = [_layer(file, group, datasets) for group, datasets in file.stored()]
        if not layers:
            raise FormatError("holds no weights")
        x = make.input("observation", shape=image_layout(layers, channels_last=True))
        make.output(chain(make, x, layers, activation, channels_last=True), "output", shape=("rows", None))
        is_image = layers[0].weight.ndim == 4
        return make.build(about=About(format="keras", producer="keras", layout="NHWC" if is_image else ""))
    except FormatError as error:
        raise error if error.path else FormatError(error.reason, path=str(file.path), op=error.op) from error


def _layer(file: KerasFile, group: str, datasets: list[str]) -> Layer:
    name = group.rpartition("/")[2]
    arrays = [file.array(dataset) for dataset in datasets]
    ranks = [array.ndim for array in arrays]
    if ranks not in ([2], [2, 1], [4], [4, 1]):
        shapes = [list(array.shape) for array in arrays]
        raise FormatError(f"layer {name!r} with arrays {shapes} is no dense layer or convolution; give config=")
    kernel = arrays[0].T if ranks[0] == 2 else arrays[0].transpose(3, 2, 0, 1)
    weight = torch.from_numpy(np.ascontiguousarray(kernel))
    return Layer(name, weight, torch.from_numpy(arrays[1]) if len(arrays) == 2 else None)
