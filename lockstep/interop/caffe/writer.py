"""Weights and solver states in Caffe's binary form, which Caffe reads too.

Field numbers: network 1 name, 100 layer (1 name, 2 type, 7 blobs); blob 5 floats, 7 shape (1 dims); solver state 1 iteration,
2 name of the weights' file, 3 history, 4 step of the learning-rate policy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import ConfigError
from lockstep.interop.caffe.graph import WEIGHTED, CaffeNetwork, blob_names
from lockstep.interop.caffe.reader import Blobs, read_blob
from lockstep.interop.wire import Wire, encode_bytes, encode_integers, encode_varint


def network_blobs(net: CaffeNetwork) -> dict[str, Blobs]:
    """The network's weights by layer, as `read_weights` gives them."""
    blobs: dict[str, Blobs] = {}
    for step in net.steps:
        if step.spec.type in WEIGHTED:
            module = net.layers[step.key]
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            blobs[step.spec.name] = [tensors[name].detach().cpu().numpy() for name in blob_names(module)]
    return blobs


def save_caffemodel(net: CaffeNetwork, path: str | Path) -> None:
    """Write a `.caffemodel`; the file appears when it is complete.

    Raises:
        ConfigError: it cannot be written.
    """
    blobs = network_blobs(net)
    parts = [encode_bytes(1, net.spec.name.encode())]
    for step in net.steps:
        body = encode_bytes(1, step.spec.name.encode()) + encode_bytes(2, step.spec.type.encode())
        body += b"".join(encode_bytes(7, _blob(blob)) for blob in blobs.get(step.spec.name, []))
        parts.append(encode_bytes(100, body))
    _write(Path(path), b"".join(parts))


def save_state(path: str | Path, *, iteration: int, weights: str, history: Sequence[Tensor], current_step: int) -> None:
    """Write a `.solverstate`.

    Raises:
        ConfigError: it cannot be written.
    """
    parts = [encode_varint(1, iteration), encode_bytes(2, weights.encode())]
    parts += [encode_bytes(3, _blob(value.detach().cpu().numpy())) for value in history]
    _write(Path(path), b"".join([*parts, encode_varint(4, current_step)]))


def read_state(path: str | Path) -> tuple[int, str, list[Tensor]]:
    """Read a `.solverstate`: iteration, file of the weights, history.

    Raises:
        FormatError: it is missing, truncated or damaged.
    """
    wire = Wire.open(path)
    iteration, weights, history = 0, "", []
    for item in wire.fields():
        if item.number == 1:
            iteration = wire.integer(item)
        elif item.number == 2:
            weights = wire.text(item)
        elif item.number == 3:
            history.append(torch.from_numpy(read_blob(wire, item, "history").astype("float32")))
        elif item.number != 4:
            raise wire.fail(item.at, f"field {item.number} is not one of a solver's state")
    if not 0 <= iteration < 1 << 40:
        raise wire.fail(0, f"iteration {iteration}: damaged")
    return iteration, weights, history


def _blob(values: np.ndarray) -> bytes:
    data = np.ascontiguousarray(values, "<f4").tobytes()
    return encode_bytes(5, data) + encode_bytes(7, encode_integers(1, values.shape))


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(data)
        Path(file.name).replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
