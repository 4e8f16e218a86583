"""Networks of TensorFlow: graphs through tf2onnx, weights of checkpoints and TF-Agents policies without TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lockstep.core.errors import FormatError
from lockstep.interop.chains import chain, groups_of, image_layout
from lockstep.interop.converters import tensorflow_to_onnx
from lockstep.interop.keras.reader import build, read_config
from lockstep.interop.tensorflow.agents import AGENTS, read_agents
from lockstep.interop.tensorflow.bundle import check_checkpoint, index_of, read_checkpoint
from lockstep.interop.tensorflow.keras_weights import ENDING, CheckpointWeights
from lockstep.interop.tensorflow.structure import check_graph_file, check_saved_model
from lockstep.interop.wire import BYTES, Wire
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About
from lockstep.models.graph.module import GraphModule

KERNELS, BIASES = ("kernel", "w", "weights", "weight"), ("bias", "b", "biases")


def read_tensorflow(
    path: Path,
    *,
    signature: str = "",
    inputs: str = "",
    outputs: str = "",
    activation: str = "",
    config: str | Path = "",
    python: str = "",
) -> GraphModule:
    """Read a network.

    Args:
        path: folder of a SavedModel (of TF-Agents too), frozen graph `.pb`, `NAME.meta` or `NAME.index` of a checkpoint.
        signature: of a SavedModel (empty: its serving signature).
        inputs, outputs: tensors of a graph, such as "obs:0,state:0" (empty: placeholders, and what nothing reads).
        activation: between the layers of a checkpoint that has no graph; of the value network in a policy of TF-Agents, where
            no stored function runs it (without it that network is left out).
        config: of a checkpoint that `save_weights` of Keras wrote (`dqn.h5f.index`), the JSON file of `model.to_json()`.
        python: interpreter with tf2onnx, see `interop.converters`.

    Raises:
        FormatError: damaged, or refused by the converter.
        MissingExtraError: a graph has to be converted and no interpreter has tf2onnx.
    """
    path = Path(path)
    if path.name == "saved_model.pb":
        path = path.parent
    if path.is_dir():
        if (path / AGENTS).exists() and not signature:
            return read_agents(path, word=activation)
        check_saved_model(path)
        tail = ["--signature_def", signature] if signature else []
        files = [path / "saved_model.pb", *(path / "variables").glob("*")]
        return tensorflow_to_onnx(path, ["--saved-model", str(path.resolve()), *tail], files=files, python=python)
    if path.suffix == ".pb":
        names = _ends(check_graph_file(path, "Graph"), inputs, outputs)
        return tensorflow_to_onnx(path, ["--graphdef", str(path.resolve()), *names], python=python)
    if config:
        return build(CheckpointWeights(path, read_config(config)))[0]
    if activation:
        return _chains(read_checkpoint(path), activation, path)
    meta = index_of(path).with_suffix(".meta")
    if not meta.exists():
        names = sorted(name.removesuffix(ENDING) for name in read_checkpoint(path))[:6]
        raise FormatError(
            f"holds variables and no graph ({meta.name} is not there); give activation='tanh' where they are chains of "
            f"layers, or config= the file of model.to_json() of Keras. Variables: {names}",
            path=str(path),
        )
    names = _ends(_graph_of_meta(meta), inputs, outputs)
    check_checkpoint(path)
    files = [meta, *path.parent.glob(f"{meta.stem}.*")]
    return tensorflow_to_onnx(path, ["--checkpoint", str(meta.resolve()), *names], files=files, python=python)


def _ends(graph: Wire, inputs: str, outputs: str) -> list[str]:
    if not inputs or not outputs:
        found = graph_ends(graph)
        inputs, outputs = inputs or ",".join(found[0]), outputs or ",".join(found[1])
    return ["--inputs", inputs, "--outputs", outputs]


SINKS = (
    "Assign",
    "NoOp",
    "SaveV2",
    "RestoreV2",
    "Const",
    "VariableV2",
    "VarHandleOp",
    "MergeV2Checkpoints",
    "ShardedFilename",
)


def graph_ends(wire: Wire) -> tuple[list[str], list[str]]:
    """(placeholders, results that no node reads) of a GraphDef (1 node; in it 1 name, 2 operation, 3 inputs), as tensors.

    Raises:
        FormatError: damaged, or it has none.
    """
    nodes: dict[str, str] = {}
    read: set[str] = set()
    for field in wire.fields():
        if field.number != 1 or field.kind != BYTES:
            continue
        name = op = ""
        for part in wire.fields(field):
            if part.number == 1:
                name = wire.text(part)
            elif part.number == 2:
                op = wire.text(part)
            elif part.number == 3:
                read.add(wire.text(part).lstrip("^").partition(":")[0])
        nodes[name] = op
    starts = [f"{name}:0" for name, op in nodes.items() if op == "Placeholder"]
    ends = [f"{name}:0" for name, op in nodes.items() if name not in read and op not in SINKS and op != "Placeholder"]
    ends = [name for name in ends if not name.startswith(("save/", "gradients/", "init"))]
    if not starts or not ends:
        raise FormatError("is no graph with placeholders and results; give inputs= and outputs=", path=wire.path)
    return starts, ends


def _graph_of_meta(path: Path) -> Wire:
    """The GraphDef (field 2) of a MetaGraphDef."""
    wire = check_graph_file(path, "MetaGraph")
    for field in wire.fields():
        if field.number == 2 and field.kind == BYTES:
            return Wire(wire.data[field.start : field.end], str(path), max_fields=wire.max_fields)
    raise FormatError("holds no graph", path=str(path))


def _out_first(kernel: torch.Tensor) -> torch.Tensor:
    """A kernel as PyTorch has it: [out, in] or [out, in, rows, columns]."""
    if kernel.ndim == 4:
        return kernel.permute(3, 2, 0, 1).contiguous()
    return kernel.T.contiguous() if kernel.ndim == 2 else kernel


def layer_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Kernels and biases under the names that `chains` knows: "pi/w" -> "pi.weight", transposed; the rest as it is."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.removesuffix(ENDING).removesuffix(":0").rpartition("/")
        word = re.sub(r"\d+$", "", last)
        number = last[len(word) :]
        if word in KERNELS:
            out[f"{stem or 'layer'}{number}.weight"] = _out_first(tensor)
        elif word in BIASES:
            out[f"{stem or 'layer'}{number}.bias"] = tensor
        else:
            out[name.removesuffix(ENDING)] = tensor
    return out


def _chains(tensors: Mapping[str, torch.Tensor], activation: str, path: Path) -> GraphModule:
    named = {name.replace("/", "."): tensor for name, tensor in layer_tensors(tensors).items() if tensor.ndim}
    make = GraphBuilder()
    try:
        groups = groups_of(named)
        if not groups:
            raise FormatError(f"holds no chains of layers; variables: {sorted(tensors)[:6]}")
        first = next(iter(groups.values()))
        x = make.input("observation", shape=image_layout(first, channels_last=True))
        for name, layers in groups.items():
            make.output(chain(make, x, layers, activation, channels_last=True), name, shape=("rows", None))
        is_image = first[0].weight.ndim == 4
        about = About(format="tensorflow", producer="tensorflow", layout="NHWC" if is_image else "")
        return make.build(about=about)
    except FormatError as error:
        raise FormatError(error.reason, path=str(path), op=error.op) from error
