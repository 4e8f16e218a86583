"""Tuned weights back into the framework's own graph, judged by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lockstep.core.errors import ConfigError, FormatError
from lockstep.core.extras import require
from lockstep.interop.onnx.reader import MARK, ORIGINAL_NAME
from lockstep.interop.onnx.tensors import to_array
from lockstep.models.graph.module import GraphModule

LARGE = 1_900_000_000
"""Bytes from which weights lie in a file of their own: a protobuf message ends at 2 GiB."""


def save_onnx(module: GraphModule, path: Path | str) -> None:
    """Write the ONNX graph that `module` was read from, with the weights it has now.

    Raises:
        ConfigError: it was not read from an ONNX file, or the path cannot be written.
        MissingExtraError: onnx is not installed.
    """
    onnx = require("onnx", extra="onnx")
    path = Path(path)
    if ORIGINAL_NAME not in module.original:
        raise ConfigError("this network was not read from an ONNX file; export the policy, or write it with torch.onnx")
    model = filled(module, onnx)
    total = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save_model(model, str(path), save_as_external_data=total > LARGE, location=path.name + ".data")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def filled(module: GraphModule, onnx: Any) -> Any:
    """The kept ModelProto with the module's tensors in it."""
    model = onnx.ModelProto.FromString(module.original[ORIGINAL_NAME])
    tensors = module.named_tensors()
    for proto in _tensors(model.graph):
        if not proto.doc_string.startswith(MARK):
            continue
        name = proto.doc_string.removeprefix(MARK)
        if name not in tensors:
            raise FormatError(f"the kept graph names the tensor {name!r}, which the module does not have")
        proto.raw_data = _bytes(tensors[name])
        proto.ClearField("doc_string")
    return model


def _bytes(tensor: torch.Tensor) -> bytes:
    content: bytes = to_array(tensor).tobytes()
    return content


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            for body in [attribute.g, *attribute.graphs]:
                yield from _tensors(body)
