"""A Keras file as a graph: Sequential and Functional models of Keras 2 and 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError, FormatError, unknown_name
from lockstep.interop.keras.chain import read_chain
from lockstep.interop.keras.files import KerasFile, json_of
from lockstep.interop.keras.layers import LAYERS, WEIGHTED
from lockstep.interop.keras.lowering import Lowering, Place, Value, Weights
from lockstep.interop.wire import read_file
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About, Dim
from lockstep.models.graph.module import GraphModule

ORIGINAL = "model.keras-file"
MAX_JSON = 1 << 24


def read_keras(path: Path, *, config: str | Path = "", activation: str = "") -> GraphModule:
    """Read a model.

    Args:
        path: `.keras`, `.h5` of `model.save`, or weights alone (`.h5f` of Keras-RL, `.weights.h5`).
        config: for weights alone, the JSON file of `model.to_json()`. Layers that have other names there (names count up
            within a process) get the file's weights in order, as Keras does it.
        activation: for weights alone of one chain of dense layers and Atari convolutions, what stands between them; its last
            layer has none.

    Raises:
        FormatError: damaged, weights without `config` or `activation`, or a layer that is not known or is code.
        ConfigError: both are given, or for a file that has its architecture.
        MissingExtraError: h5py is not installed.
    """
    path = Path(path)
    file = KerasFile(path)
    if activation and (config or file.config):
        raise ConfigError(f"{path}: activation={activation!r} is for weights alone; here the architecture is known")
    if activation:
        return read_chain(file, activation)
    if config:
        file.config = read_config(config)
    elif not file.config:
        raise FormatError(
            "holds weights and no architecture; give config= the file of model.to_json(), or activation='relu' where they are "
            f"one chain of layers. Layers: {[group for group, _ in file.stored()][:6]}",
            path=str(path),
        )
    return build(file)[0]


def read_config(path: str | Path) -> dict[str, Any]:
    """What `model.to_json()` gave.

    Raises:
        FormatError: it is no such JSON.
    """
    return json_of(read_file(path, MAX_JSON), Path(path))


def build(file: Weights) -> tuple[GraphModule, list[Place]]:
    """(the network, where each of its tensors came from)."""
    path = str(file.path)
    try:
        low = Lowering(GraphBuilder(), file, keras2=_is_keras2(file.config))
        kind, config = file.config["class_name"], file.config["config"]
        if kind not in ("Sequential", "Functional", "Model"):
            raise FormatError(f"a model of the class {kind!r} is code; Sequential and Functional are read")
        layers = config["layers"] if isinstance(config, dict) else config
        groups = file.places(layers, WEIGHTED)
        is_image = (_sequential if kind == "Sequential" else _functional)(low, config, layers, groups)
        producer = "keras 2" if low.keras2 else "keras 3"
        about = About(format="keras", producer=producer, layout="NHWC" if is_image else "")
        original = {ORIGINAL: file.content} if file.content else {}
        return low.make.build(about=about, original=original), low.places
    except FormatError as error:
        raise error if error.path else FormatError(error.reason, path=path, op=error.op) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, RecursionError) as error:
        raise FormatError(f"its configuration is damaged: {type(error).__name__}: {error}", path=path) from error


def _is_keras2(config: dict[str, Any]) -> bool:
    """Keras 3 writes the shape of an input as batch_shape and policies of dtypes as objects."""
    text = json.dumps(config)
    return "batch_input_shape" in text and '"batch_shape"' not in text


def _input(low: Lowering, config: dict[str, Any]) -> Value:
    shape = config.get("batch_shape") or config.get("batch_input_shape")
    if not shape:
        raise FormatError("does not tell the shape of its input: it was saved before it was built")
    dims: list[Dim] = ["rows", *(None if n is None else int(n) for n in shape[1:])]
    dtype = config.get("dtype", "float32")
    word = dtype if isinstance(dtype, str) else "float32"
    return Value(len(dims), last=low.make.input(str(config["name"]), dtype=word, shape=dims))


def _apply(low: Lowering, layer: dict[str, Any], xs: list[Value], groups: dict[str, str]) -> Value:
    kind = str(layer["class_name"])
    if kind not in LAYERS:
        near = unknown_name("layer", kind, [name for name in LAYERS if name[:3] == kind[:3]] or LAYERS)
        raise FormatError("is code, which is not executed" if kind == "Lambda" else near, op=kind)
    config = layer["config"]
    try:
        return LAYERS[kind](low, config, xs, low.file.datasets(groups[config["name"]]))
    except FormatError as error:
        raise error if error.path else FormatError(f"layer {config['name']!r} {error.reason}", op=kind) from error


def _sequential(low: Lowering, config: Any, layers: list[dict[str, Any]], groups: dict[str, str]) -> bool:
    x: Value | None = None
    is_image = False
    for layer in layers:
        if layer["class_name"] == "InputLayer":
            x = _input(low, layer["config"])
        else:
            if x is None:
                built = (config.get("build_input_shape") if isinstance(config, dict) else None) or None
                x = _input(low, {"batch_input_shape": built, **layer["config"], "dtype": "float32"})
            x = _apply(low, layer, [x], groups)
        is_image = is_image or x.rank == 4
    if x is None:
        raise FormatError("has no layers")
    low.make.output(low.last(x), "output", shape=("rows", *[None] * (x.rank - 1)))
    return is_image


def _functional(low: Lowering, config: Any, layers: list[dict[str, Any]], groups: dict[str, str]) -> bool:
    values: dict[str, Value] = {}
    waiting = {str(layer["config"]["name"]): layer for layer in layers}
    while waiting:
        ready = []
        for name, layer in waiting.items():
            if layer["class_name"] == "InputLayer":
                values[name] = _input(low, layer["config"])
                ready.append(name)
                continue
            sources = _sources(layer)
            if all(source in values for source in sources):
                values[name] = _apply(low, layer, [values[source] for source in sources], groups)
                ready.append(name)
        if not ready:
            raise FormatError(f"layers {list(waiting)[:4]} wait for each other or for layers that are not there")
        for name in ready:
            del waiting[name]
    outputs = config["output_layers"]
    if isinstance(outputs, dict):
        named = [(str(name), entry[0]) for name, entry in outputs.items()]
    else:
        named = [(str(entry[0]), entry[0]) for entry in ([outputs] if isinstance(outputs[0], str) else outputs)]
    for name, source in named:
        value = values[source]
        low.make.output(low.last(value), name, shape=("rows", *[None] * (value.rank - 1)))
    return any(value.rank == 4 for value in values.values())


def _sources(layer: dict[str, Any]) -> list[str]:
    """Names of the layers that a layer reads; Keras 3 nests tensors in arguments, Keras 2 lists them."""
    nodes = layer["inbound_nodes"]
    if len(nodes) != 1:
        raise FormatError(f"layer {layer['config']['name']!r} is used {len(nodes)} times; once is read")
    if isinstance(nodes[0], dict):
        found: list[str] = []
        _collect(nodes[0]["args"], found)
        return found
    return [str(entry[0]) for entry in nodes[0]]


def _collect(value: Any, found: list[str]) -> None:
    if isinstance(value, list):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        found.append(str(value["config"]["keras_history"][0]))
