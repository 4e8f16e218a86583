"""ONNX files made for tests."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def mlp(path: Path, sizes: tuple[int, ...], *, softmax: bool = False, value: bool = False, seed: int = 0) -> Path:
    """A dense tanh network `obs` -> `out` (and `value`), its first layer as MatMul and Add, as exporters differ."""
    rng = np.random.default_rng(seed)
    nodes, tensors, x = [], [], "obs"

    def tensor(name: str, array: np.ndarray) -> str:
        tensors.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        weight, bias = rng.normal(0, a**-0.5, (a, b)), np.zeros(b)
        last = i == len(sizes) - 2
        if i == 0:
            nodes.append(helper.make_node("MatMul", [x, tensor("w0", weight)], ["m0"]))
            nodes.append(helper.make_node("Add", ["m0", tensor("b0", bias)], ["z0"]))
        else:
            inputs = [x, tensor(f"w{i}", weight.T * (0.01 if last else 1.0)), tensor(f"b{i}", bias)]
            nodes.append(helper.make_node("Gemm", inputs, [f"z{i}"], transB=1))
        if last and value:
            nodes.append(helper.make_node("Gemm", [x, tensor("wv", rng.normal(0, 0.1, (1, a)))], ["value"], transB=1))
        x = f"z{i}"
        if not last:
            nodes.append(helper.make_node("Tanh", [x], [f"h{i}"]))
            x = f"h{i}"
    nodes.append(helper.make_node("Softmax" if softmax else "Identity", [x], ["out"]))
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["rows", sizes[-1]])]
    if value:
        outputs.append(helper.make_tensor_value_info("value", TensorProto.FLOAT, ["rows", 1]))
    inputs = [helper.make_tensor_value_info("obs", TensorProto.FLOAT, ["rows", sizes[0]])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path
