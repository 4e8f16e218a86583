"""Programs of `torch.export` (`.pt2`) as graphs: the archive's JSON and raw numbers are read, nothing of it is executed.

`torch.export.load` would evaluate the file's symbolic expressions and unpickle its objects. Both layouts are read: that of
PyTorch 2.7 and newer (`NAME/models/model.json`) and the older one (`serialized_exported_program.json`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lockstep.core.errors import FormatError
from lockstep.interop.archives import Archive
from lockstep.interop.pytorch.state import tensors_of, unpickle
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About, Dim
from lockstep.models.graph.module import GraphModule
from lockstep.models.graph.ops import OPS

SCALARS = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
}
"""Numbers of element types in the schema."""
INTEGERS = {
    "add": "lockstep.IntegerAdd",
    "sub": "lockstep.IntegerSub",
    "mul": "lockstep.IntegerMul",
    "floordiv": "lockstep.IntegerFloorDiv",
    "mod": "lockstep.IntegerMod",
    "sym_max": "lockstep.IntegerMax",
    "sym_min": "lockstep.IntegerMin",
}
CHECKS = ("_assert", "sym_constrain", "_guards_fn", "_operator.ge", "_operator.le", "_operator.eq", "_operator.ne")
"""Calls that only check sizes."""
SKIPPED = ("as_memory_format", "as_layout", "as_device")
INPLACE = {"relu_": "relu", "tanh_": "tanh", "sigmoid_": "sigmoid", "elu_": "elu", "leaky_relu_": "leaky_relu"}
MAJOR = (5, 8)
"""Versions of the schema that are read: from 5 (PyTorch 2.2) to 8 (2.5 to 2.13)."""


def read_pt2(path: Path) -> GraphModule:
    """Read a program.

    Raises:
        FormatError: damaged, of a schema that is not known, or with an operator that graphs do not have.
    """
    path = Path(path)
    archive = Archive(path, "an archive of torch.export.save")
    try:
        return _Program(archive).build()
    except FormatError as error:
        raise error if error.path else FormatError(error.reason, path=str(path), op=error.op) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError(f"its program is damaged: {type(error).__name__}: {error}", path=str(path)) from error


class _Program:
    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.make = GraphBuilder()
        self.names: dict[str, str] = {}
        modern = [name for name in archive.names if name.endswith(".json") and "/models/" in name]
        if len(modern) == 1:
            self.root, _, model = modern[0].partition("models/")
            self.tensors = self._raw_tensors(model.removesuffix(".json"))
            self.data = self._json(modern[0])
        elif "serialized_exported_program.json" in archive:
            self.tensors = self._saved_tensors()
            self.data = self._json("serialized_exported_program.json")
        else:
            raise FormatError(f"holds {len(modern)} programs of torch.export; one was expected")
        version = self.data["schema_version"]
        major = version["major"] if isinstance(version, dict) else version
        if not MAJOR[0] <= major <= MAJOR[1]:
            raise FormatError(f"schema {major} of torch.export; {MAJOR[0]} to {MAJOR[1]} are read")
        self.graph = self.data["graph_module"]["graph"]

    def _json(self, name: str) -> Any:
        return json.loads(self.archive.read(name))

    def _raw_tensors(self, model: str) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for kind in ("weights", "constants"):
            folder = f"{self.root}data/{kind}/"
            for name, entry in self._json(f"{folder}{model}_{kind}_config.json")["config"].items():
                if entry["use_pickle"] or entry["tensor_meta"] is None:
                    raise FormatError(f"{name!r} is a pickled object, which is not loaded")
                raw = self.archive.read(folder + entry["path_name"])
                tensors[name] = _tensor(raw, entry["tensor_meta"], name)
        return tensors

    def _saved_tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for member in ("serialized_state_dict.pt", "serialized_constants.pt"):
            content = self.archive.read(member) if member in self.archive else b""
            if not content:
                continue
            inner = Archive(self.archive.path, f"{member} of torch.export", content)
            root = next((name for name in inner.names if name.endswith("data.pkl")), "data.pkl").removesuffix(
                "data.pkl"
            )
            value = unpickle(inner, root)
            tensors.update(tensors_of(value, self.archive.path) if value else {})
        return tensors

    def build(self) -> GraphModule:
        signature = self.data["graph_module"]["signature"]
        for spec in signature["input_specs"]:
            ((kind, entry),) = spec.items()
            self._place(kind, entry)
        for node in self.graph["nodes"]:
            self._add(node)
        names = self._output_names(len(signature["output_specs"]))
        for spec, name in zip(signature["output_specs"], names, strict=True):
            ((kind, entry),) = spec.items()
            if kind != "user_output":
                raise FormatError(f"an output of the kind {kind}: export the network in evaluation, without mutation")
            self.make.output(self._name(entry["arg"]["as_tensor"]["name"]), name)
        producer = f"torch {self.data.get('torch_version', '')}".strip()
        return self.make.build(about=About(format="torch.export", producer=producer))

    def _place(self, kind: str, entry: Mapping[str, Any]) -> None:
        if kind == "user_input":
            argument = entry["arg"]
            if "as_tensor" not in argument:
                return
            name = argument["as_tensor"]["name"]
            meta = self.graph["tensor_values"][name]
            dims = [_dim(size) for size in meta["sizes"]]
            self.names[name] = self.make.input(name, dtype=SCALARS[meta["dtype"]], shape=dims)
            return
        keys = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
        if kind not in keys:
            raise FormatError(f"an input of the kind {kind}, which is not known here")
        target, placeholder = entry[keys[kind]], entry["arg"]["name"]
        if target not in self.tensors:
            raise FormatError(f"its tensor {target!r} is missing")
        is_weight = kind == "parameter" and self.tensors[target].dtype.is_floating_point
        self.names[placeholder] = self.make.tensor(target, self.tensors[target], trainable=is_weight)

    def _add(self, node: Mapping[str, Any]) -> None:
        target: str = node["target"]
        if any(check in target for check in CHECKS):
            return
        op = target.removeprefix("torch.ops.")
        if "operator." in target or "sym_m" in target:
            op = INTEGERS.get(target.rpartition(".")[2], target)
        parts = op.split(".")
        if len(parts) == 3 and parts[1] in INPLACE:
            op = f"aten.{INPLACE[parts[1]]}.{parts[2]}"
        if op not in OPS or not op.startswith(("aten.", "lockstep.Integer")):
            raise FormatError("has no form in a graph", op=op)
        inputs: list[str] = []
        positional, named = [], {}
        for argument in node["inputs"]:
            value = self._encode(argument["arg"], inputs)
            if argument.get("kind", 1) == 2:
                named[argument["name"]] = value
            else:
                positional.append(value)
        outputs = self._outputs(node["outputs"])
        self.make.node(
            op, inputs, outputs=outputs, name=str(node.get("name") or ""), call=json.dumps([positional, named])
        )

    def _outputs(self, entries: list[Mapping[str, Any]]) -> list[str]:
        names: list[str] = []
        for entry in entries:
            ((kind, value),) = entry.items()
            many = value if kind in ("as_tensors", "as_optional_tensors") else [value]
            for item in many:
                inner = item.get("as_tensor", item) if isinstance(item, dict) else {}
                name = inner.get("name") or inner.get("as_name") or ""
                names.append(name)
                if name:
                    self.names[name] = name
        return names

    def _name(self, name: str) -> str:
        if name not in self.names:
            raise FormatError(f"the value {name!r} is used before it is computed")
        return self.names[name]

    def _encode(self, argument: Mapping[str, Any], inputs: list[str]) -> Any:
        ((kind, value),) = argument.items()
        if kind in SKIPPED:
            return {"$skip": kind}
        if kind == "as_none":
            return None
        if kind == "as_scalar_type":
            return {"$dtype": SCALARS[value]}
        if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._value(value, inputs)
        if kind in ("as_tensors", "as_sym_ints"):
            return [self._value(item, inputs) for item in value]
        if kind == "as_optional_tensors":
            return [None if "as_none" in item else self._value(item["as_tensor"], inputs) for item in value]
        if kind in ("as_int", "as_float", "as_bool", "as_string", "as_ints", "as_floats", "as_bools", "as_strings"):
            return _numbers(value)
        raise FormatError(f"an argument of the kind {kind}, which has no form in a graph")

    def _value(self, item: Any, inputs: list[str]) -> Any:
        """A tensor or size by name, or a plain size."""
        if "as_int" in item:
            return _numbers(item["as_int"])
        inputs.append(self._name(item["name"] if "name" in item else item["as_name"]))
        return {"$input": len(inputs) - 1}

    def _output_names(self, num: int) -> list[str]:
        """Keys of a dictionary that the program returns, else output, output_1, ..."""
        for entry in self.data["graph_module"]["module_call_graph"]:
            if entry["fqn"] == "" and entry["signature"]:
                spec = json.loads(entry["signature"]["out_spec"])[1]
                if spec["type"] == "builtins.dict" and len(spec["children_spec"]) == num:
                    return [str(key) for key in json.loads(spec["context"])]
        return ["output", *(f"output_{index}" for index in range(1, num))][:num]


def _numbers(value: Any) -> Any:
    """Plain numbers as JSON has them: infinities are words in the schema."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and value in ("Infinity", "-Infinity", "NaN"):
        return float(value.replace("Infinity", "inf"))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FormatError(f"an argument {value!r:.60} is no number")


def _dim(size: Mapping[str, Any]) -> Dim:
    if "as_int" in size:
        return int(size["as_int"])
    text = str(size["as_expr"]["expr_str"])
    return text.split("'")[1] if text.count("'") >= 2 else text


def _tensor(raw: bytes, meta: Mapping[str, Any], name: str) -> torch.Tensor:
    if meta["dtype"] not in SCALARS:
        raise FormatError(f"tensor {name!r} has the unknown element type {meta['dtype']}")
    dtype = torch.__dict__[SCALARS[meta["dtype"]]]
    size, stride = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))
    offset = int(meta["storage_offset"]["as_int"])
    if min([offset, *size, *stride], default=0) < 0 or len(size) != len(stride) or len(raw) % dtype.itemsize:
        raise FormatError(f"tensor {name!r} has the shape {size}, strides {stride} and {len(raw)} bytes")
    if not math.prod(size):
        return torch.zeros(size, dtype=dtype)
    numbers = torch.frombuffer(bytearray(raw), dtype=dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= numbers.numel() or math.prod(size) > numbers.numel():
        raise FormatError(f"tensor {name!r} of shape {size} reaches beyond its {numbers.numel()} numbers")
    return torch.as_strided(numbers, size, stride, offset).clone()
