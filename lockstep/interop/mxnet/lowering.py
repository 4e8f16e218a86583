"""An MXNet network as a graph, for `lockstep.load_network`, `lockstep import` and policies."""

from __future__ import annotations

from pathlib import Path

from lockstep.core.errors import FormatError
from lockstep.interop.mxnet.graph import MXNetNetwork, load_mxnet
from lockstep.interop.traced import parse_shapes, trace
from lockstep.models.graph.graph import About, Dim
from lockstep.models.graph.module import GraphModule


def read_mxnet(path: Path, *, params: str | Path = "", symbol: str | Path = "", shapes: str = "") -> GraphModule:
    """Read a network with its weights.

    Args:
        path: `NAME-symbol.json`, or `NAME-0000.params`; the other file is found by NAME in the same folder (the highest
            epoch).
        params, symbol: the other file, where it is called otherwise.
        shapes: of inputs that no layer tells, such as "data=4,84,84" (without the batch), several split by ";".

    Raises:
        FormatError: a file is missing, damaged or not known, or an input's shape cannot be told.
    """
    path = Path(path)
    if path.suffix == ".params":
        stem = path.stem.rpartition("-")[0] or path.stem
        graph, arrays = Path(symbol) if symbol else path.with_name(f"{stem}-symbol.json"), path
    else:
        stem = path.name.removesuffix("-symbol.json")
        epochs = sorted(path.parent.glob(f"{stem}-[0-9][0-9][0-9][0-9].params"))
        graph, arrays = path, Path(params) if params else (epochs or [path.with_name(f"{stem}-0000.params")])[-1]
    for file, option in ((graph, "symbol"), (arrays, "params")):
        if not file.exists():
            raise FormatError(f"its companion {file} does not exist; give it with {option}=", path=str(path))
    net = load_mxnet(graph, arrays)
    given = parse_shapes(shapes, str(path))
    known = {name: given.get(name) or _shape(net, name) for name in net.input_names}
    missing = [name for name, shape in known.items() if shape is None]
    if missing:
        raise FormatError(
            f"does not tell the shape of input {missing[0]!r}; give shapes='{missing[0]}=4,84,84'", path=str(path)
        )
    declared: dict[str, tuple[Dim, ...]] = {name: shape for name, shape in known.items() if shape is not None}
    steps = any(len(shape) == 3 and shape[0] == "steps" for shape in declared.values())
    about = About(
        format="mxnet",
        layout="NCHW" if any(len(shape) == 4 for shape in declared.values()) else "",
        time_axis=0 if steps else None,
    )
    original = {"net-symbol.json": graph.read_bytes()}
    return trace(net, declared, net.output_names, about=about, path=str(path), original=original)


def _shape(net: MXNetNetwork, name: str) -> tuple[Dim, ...] | None:
    """An input's shape as the file declares it, or as the layer that reads it tells."""
    declared = net.input_shapes[name]
    if declared is not None and all(dim > 0 for dim in declared[1:]):
        return ("batch", *declared[1:])
    arrays = dict(net.weights.items())
    for call in net.calls:
        if not call.inputs or call.inputs[0] not in {(number, 0) for number, own in net.inputs if own == name}:
            continue
        weight = arrays.get(net.key_of(call.inputs[1][0])) if len(call.inputs) > 1 else None
        if call.node.op == "FullyConnected" and weight is not None:
            return ("batch", weight.shape[1])
        if call.node.op == "RNN":
            return ("steps", "batch", _rnn_width(net, call.node.integer("state_size", 0), call.node.string("mode", "")))
    return None


def _rnn_width(net: MXNetNetwork, hidden: int, mode: str) -> int:
    """The input width of a recurrence, from the first matrix of its weights."""
    gates = {"lstm": 4, "gru": 3}.get(mode, 1)
    for key, value in net.weights.items():
        if "l0_i2h_weight" in key and value.ndim == 2 and value.shape[0] == gates * hidden:
            return int(value.shape[1])
    raise FormatError("does not tell the width of its recurrence; give shapes=", path=net.symbol.path)
