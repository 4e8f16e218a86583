"""The graph of an imported network: built, run, trained, saved, refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.core.errors import CheckpointError, FormatError, InputError
from lockstep.models.graph import Graph, GraphBuilder, GraphModule, load_graph, save_graph


def small(seed: int = 0) -> GraphModule:
    """x [rows, 3] -> tanh(x W1 + b1) reshaped through shape arithmetic -> W2."""
    rng = np.random.default_rng(seed)
    make = GraphBuilder()
    x = make.input("x", shape=("rows", 3))
    first = make.tensor("fc1.weight", rng.normal(size=(3, 5)).astype(np.float32))
    bias = make.tensor("fc1.bias", rng.normal(size=5).astype(np.float32))
    second = make.tensor("fc2.weight", rng.normal(size=(5, 2)).astype(np.float32))
    hidden = make.node("Tanh", [make.node("Add", [make.node("MatMul", [x, first]), bias])])
    rows = make.node("Gather", [make.node("Shape", [hidden]), make.constant([0])], axis=0)
    sizes = make.node("Concat", [rows, make.constant([-1])], axis=0)
    make.output(make.node("MatMul", [make.node("Reshape", [hidden, sizes]), second]), "y")
    make.output(make.node("Shape", [hidden]), "sizes", dtype="int64")
    return make.build(original={"net.txt": b"as it was"})


def test_runs_like_the_same_network_by_hand() -> None:
    module = small()
    tensors = module.named_tensors()
    x = torch.randn(7, 3)
    y, sizes = module(x)
    expected = torch.tanh(x @ tensors["fc1.weight"] + tensors["fc1.bias"]) @ tensors["fc2.weight"]
    assert torch.allclose(y, expected, atol=1e-6)
    assert sizes.tolist() == [7, 5]
    assert torch.equal(module.run({"x": x})["y"], y)


def test_every_weight_gets_a_gradient_and_no_constant_is_one() -> None:
    module = small()
    assert set(dict(module.named_parameters())) == {"fc1/weight", "fc1/bias", "fc2/weight"}
    module(torch.randn(4, 3))[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


def test_folder_keeps_the_graph_the_weights_and_the_original(tmp_path: Path) -> None:
    module = small()
    save_graph(module, tmp_path / "net")
    again = load_graph(tmp_path / "net")
    x = torch.randn(2, 3)
    assert torch.equal(again(x)[0], module(x)[0])
    assert again.graph == module.graph
    assert again.original == {"net.txt": b"as it was"}


def test_two_modules_of_one_graph_share_nothing() -> None:
    module = small()
    twin = GraphModule(module.graph, dict(module.state_dict()))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert bool(next(module.parameters()).abs().sum() > 0)


def test_compiles_to_one_graph_for_any_number_of_rows() -> None:
    module = small()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, (torch.randn(3, 3),), dynamic_shapes=(({0: rows},),)).module()
    for num in (2, 9):
        x = torch.randn(num, 3)
        assert torch.allclose(program(x)[0], module(x)[0], atol=1e-6)


def test_what_does_not_fit_is_told_with_its_operation() -> None:
    module = small()
    with pytest.raises(FormatError, match=r"operation MatMul: does not fit its inputs \(x float32 \[2, 4\]"):
        module(torch.randn(2, 4))
    with pytest.raises(InputError, match="got 2 inputs; expected 1: x float32"):
        module(torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(InputError, match=r"inputs are \['x'\]"):
        module.run({"z": torch.randn(2, 3)})


def test_unknown_operations_and_names_are_refused() -> None:
    make = GraphBuilder()
    make.output(make.node("Tanhh", [make.input("x")]))
    with pytest.raises(FormatError, match="unknown operation 'Tanhh'; did you mean 'Tanh'"):
        make.build()
    make = GraphBuilder()
    make.output(make.node("Add", [make.input("x"), "nothing"]))
    with pytest.raises(FormatError, match="operation Add: input 'nothing'"):
        make.build()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    save_graph(small(), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(CheckpointError):
        load_graph(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    document = json.loads((tmp_path / "config.json").read_text())
    document["graph"]["nodes"][0]["outputs"] = 3
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError):
        load_graph(tmp_path)
    with pytest.raises(FormatError):
        Graph.from_json({"inputs": 1})
