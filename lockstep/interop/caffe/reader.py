"""Caffe's files as plain data: a network's description from `.prototxt`, its weights from `.caffemodel` or `.caffemodel.h5`.

Field numbers used of the binary file: network 1 name, 2 `layers` (V1), 100 `layer`; layer 1 name, 7 blobs; V1 layer 4 name,
6 blobs, 1 the V0 layer inside (1 name, 50 blobs); blob 1-4 num channels height width, 5 floats, 7 shape (1 dims), 8 doubles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import FormatError, unknown_name
from lockstep.core.extras import require
from lockstep.interop.caffe.schema import (
    LAYER_FIELDS,
    NET_FIELDS,
    PARAMETERS,
    SPEC_FIELDS,
    STATE_RULE_FIELDS,
    upgrade_v1,
)
from lockstep.interop.caffe.text import Message, read_text
from lockstep.interop.wire import Field, Wire

Phase = Literal["TRAIN", "TEST"]
Blobs = list[NDArray[Any]]
MAX_LAYERS = 1 << 14
MAX_DIMS = 32
MAX_ELEMENTS = 1 << 33
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class ParamSpec:
    """Training settings of one blob: multipliers of learning rate and weight decay, and a name under which layers share it."""

    name: str = ""
    lr_mult: float = 1.0
    decay_mult: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """A layer as described. `message` holds its `*_param` messages."""

    name: str
    type: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    message: Message
    specs: tuple[ParamSpec, ...] = ()
    loss_weights: tuple[float, ...] = ()

    def param(self, name: str) -> Message:
        """The parameters under `name`, checked for unknown fields."""
        message = self.message.message(name)
        message.known(PARAMETERS[name])
        message.where = f"layer {self.name!r} ({self.type})"
        return message

    def fail(self, message: str) -> FormatError:
        """An error that names file, line, layer and type."""
        return FormatError(
            f"line {self.message.line}: layer {self.name!r} ({self.type}): {message}", path=self.message.path
        )


@dataclass(frozen=True)
class NetSpec:
    """A network in one phase. `inputs` are those named outside layers (`input:`), with their shapes where given."""

    name: str
    path: str
    layers: tuple[LayerSpec, ...]
    inputs: dict[str, tuple[int, ...] | None] = field(default_factory=dict)


def read_net(path: str | Path, *, phase: Phase = "TEST", level: int = 0, stages: tuple[str, ...] = ()) -> NetSpec:
    """Read a network's description and keep the layers of one phase.

    Args:
        path: a `.prototxt`.
        phase, level, stages: the state that `include` and `exclude` rules are held against.

    Raises:
        FormatError: the file is missing, damaged, or says something that is not known; names file and line.
    """
    return net_from_message(read_text(path), phase=phase, level=level, stages=stages)


def net_from_message(net: Message, *, phase: Phase, level: int = 0, stages: tuple[str, ...] = ()) -> NetSpec:
    """As `read_net`, of a description already parsed."""
    net.where = "network"
    net.known(NET_FIELDS)
    if "layer" in net and "layers" in net:
        raise net.fail("has both `layer` and `layers` entries; a file is of one generation")
    messages = net.messages("layer") or [upgrade_v1(old) for old in net.messages("layers")]
    if not messages:
        raise net.fail("describes no layers; is it a network's .prototxt?")
    if len(messages) > MAX_LAYERS:
        raise net.fail(f"has {len(messages)} layers, more than {MAX_LAYERS}")
    state = net.message("state")
    level, stages = state.integer("level", level), tuple(state.strings("stage")) or stages
    layers = tuple(_layer(message) for message in messages if _included(message, phase, level, stages))
    return NetSpec(net.string("name"), net.path, layers, _outer_inputs(net))


def _outer_inputs(net: Message) -> dict[str, tuple[int, ...] | None]:
    names = net.strings("input")
    shapes: list[tuple[int, ...] | None] = [tuple(shape.integers("dim")) for shape in net.messages("input_shape")]
    dims = net.integers("input_dim")
    if not shapes and dims:
        if len(dims) != 4 * len(names):
            raise net.fail(f"{len(dims)} values of input_dim for {len(names)} inputs; four for each were expected")
        shapes = [tuple(dims[start : start + 4]) for start in range(0, len(dims), 4)]
    if shapes and len(shapes) != len(names):
        raise net.fail(f"{len(names)} inputs and {len(shapes)} shapes")
    return dict(zip(names, shapes or [None] * len(names), strict=True))


def _layer(message: Message) -> LayerSpec:
    message.known(LAYER_FIELDS)
    name = message.string("name")
    message.where = f"layer {name!r}"
    if not message.string("type"):
        raise message.fail("has no type")
    specs = []
    for spec in message.messages("param"):
        spec.known(SPEC_FIELDS)
        specs.append(ParamSpec(spec.string("name"), spec.real("lr_mult", 1.0), spec.real("decay_mult", 1.0)))
    return LayerSpec(
        name,
        message.string("type"),
        tuple(message.strings("bottom")),
        tuple(message.strings("top")),
        message,
        tuple(specs),
        tuple(message.reals("loss_weight")),
    )


def _included(message: Message, phase: Phase, level: int, stages: tuple[str, ...]) -> bool:
    include, exclude = message.messages("include"), message.messages("exclude")
    if include and exclude:
        raise message.fail("has include and exclude rules; a layer may have one kind")
    rules = include or exclude
    met = any(_meets(rule, phase, level, stages) for rule in rules)
    return met if include else not met


def _meets(rule: Message, phase: Phase, level: int, stages: tuple[str, ...]) -> bool:
    rule.known(STATE_RULE_FIELDS)
    return (
        rule.enum("phase", ("TRAIN", "TEST"), phase) == phase
        and rule.integer("min_level", level) <= level <= rule.integer("max_level", level)
        and all(stage in stages for stage in rule.strings("stage"))
        and not any(stage in stages for stage in rule.strings("not_stage"))
    )


def read_weights(path: str | Path) -> dict[str, Blobs]:
    """The blobs of each layer by its name.

    Args:
        path: `.caffemodel` (of any generation) or `.caffemodel.h5`; told apart by content.

    Raises:
        FormatError: the file is missing, truncated, damaged or of another kind; names file and offset.
        MissingExtraError: an HDF5 file, and h5py is not installed.
    """
    wire = Wire.open(path)
    if bytes(wire.data[:8]) == HDF5_MAGIC:
        return _read_hdf5(Path(path))
    weights: dict[str, Blobs] = {}
    for layer in wire.fields():
        if layer.number == 100:
            _add(wire, layer, *_read_layer(wire, layer, 1, 7), weights)
        elif layer.number == 2:
            _add(wire, layer, *_read_v1_layer(wire, layer), weights)
        elif layer.number not in (1, 3, 4, 5, 6, 7, 8):
            raise wire.fail(layer.at, f"field {layer.number} is not one of a network: not a .caffemodel, or damaged")
    if not weights:
        raise FormatError("holds no layers: not a .caffemodel, or truncated", path=wire.path)
    return weights


def _add(wire: Wire, layer: Field, name: str, blobs: Blobs, weights: dict[str, Blobs]) -> None:
    if name in weights and blobs and weights[name]:
        raise wire.fail(layer.at, f"two layers are named {name!r}")
    if len(weights) > MAX_LAYERS:
        raise wire.fail(layer.at, f"more than {MAX_LAYERS} layers: damaged")
    weights[name] = blobs or weights.get(name, [])


def _read_layer(wire: Wire, layer: Field, name_number: int, blobs_number: int) -> tuple[str, Blobs]:
    name, blobs = "", []
    for item in wire.fields(layer):
        if item.number == name_number:
            name = wire.text(item)
        elif item.number == blobs_number:
            blobs.append(read_blob(wire, item, name))
    return name, blobs


def _read_v1_layer(wire: Wire, layer: Field) -> tuple[str, Blobs]:
    inner = [item for item in wire.fields(layer) if item.number == 1]
    return _read_layer(wire, inner[0], 1, 50) if inner else _read_layer(wire, layer, 4, 6)


def read_blob(wire: Wire, blob: Field, layer: str) -> NDArray[Any]:
    """One blob as an array in its stored shape, a view into the file.

    Raises:
        FormatError: its shape and its values do not match, or it is of a form that is not read here.
    """
    shape: list[int] = []
    old_shape = [0, 0, 0, 0]
    parts: list[NDArray[Any]] = []
    has_old_shape = has_shape = False
    for item in wire.fields(blob):
        if item.number in (5, 8):
            parts.append(wire.array(item, "<f4" if item.number == 5 else "<f8"))
        elif item.number == 7:
            has_shape = True
            shape += [dim for part in wire.fields(item) if part.number == 1 for dim in wire.integers(part, MAX_DIMS)]
        elif item.number in (1, 2, 3, 4):
            has_old_shape = True
            old_shape[item.number - 1] = wire.integer(item)
        elif item.number not in (6, 9):
            raise wire.fail(item.at, f"a blob of layer {layer!r} has field {item.number}, a form that is not read here")
    dims = old_shape if has_old_shape and not has_shape else shape
    values = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.float32)
    if any(dim < 0 for dim in dims) or math.prod(dims) > MAX_ELEMENTS or math.prod(dims) != values.size:
        raise wire.fail(
            blob.at, f"a blob of layer {layer!r} has shape {tuple(dims)} and {values.size} values: truncated or damaged"
        )
    return values.reshape(dims)


def _read_hdf5(path: Path) -> dict[str, Blobs]:
    h5py = require("h5py", extra="caffe")
    try:
        with h5py.File(path, "r") as file:
            if "data" not in file or not isinstance(file["data"], h5py.Group):
                raise FormatError("has no group `data`; not weights of Caffe", path=str(path))
            if len(file["data"]) > MAX_LAYERS:
                raise FormatError(f"has more than {MAX_LAYERS} layers", path=str(path))
            return {str(name): _hdf5_blobs(h5py, file["data"], name, path) for name in file["data"]}
    except (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        MemoryError,
        OverflowError,
    ) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"cannot be read as HDF5: {error}: truncated or damaged", path=str(path)) from error


def _hdf5_blobs(h5py: Any, data: Any, name: str, path: Path) -> Blobs:
    layer = data[name]
    if not isinstance(layer, h5py.Group):
        raise FormatError(f"layer {name!r} is not a group of blobs", path=str(path))
    blobs = []
    for number in range(len(layer)):
        blob = layer.get(str(number))
        if not isinstance(blob, h5py.Dataset):
            raise FormatError(f"layer {name!r} has {len(layer)} blobs and none named {number}", path=str(path))
        if blob.dtype.kind != "f" or blob.dtype.itemsize not in (2, 4, 8) or blob.nbytes > path.stat().st_size:
            raise FormatError(
                f"layer {name!r}, blob {number}: {blob.dtype} of shape {blob.shape} is not weights stored in this file",
                path=str(path),
            )
        blobs.append(np.asarray(blob[()]))
    return blobs


def check_names(weights: dict[str, Blobs], spec: NetSpec, path: str) -> None:
    """Refuse weights of another network: no layer of the description is in the file.

    Raises:
        FormatError: with names of both sides.
    """
    named = [name for name, blobs in weights.items() if blobs]
    if named and not {layer.name for layer in spec.layers} & set(named):
        raise FormatError(
            f"its layers ({unknown_name('layer', spec.layers[0].name, named)}) are not those of {spec.path}", path=path
        )
