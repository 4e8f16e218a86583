"""Inference programs of PaddlePaddle as a list of operations: `.json` (version 3, PIR) and `.pdmodel` (version 2).

Both become the operations of version 3, whose inputs stand in order. The number of each field of `.pdmodel` is written where it
is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.core.errors import FormatError
from lockstep.interop.wire import BYTES, VARINT, Field, Wire, read_file

MAX_TEXT = 1 << 28
Value = str | list[str]


@dataclass
class Op:
    """One operation: inputs are names, lists of them, or "" where one is left out."""

    name: str
    inputs: list[Value]
    outputs: list[Value]
    attributes: dict[str, Any]


@dataclass
class Program:
    """A block: what it reads, its operations, what it yields. `shapes` has -1 for free dimensions."""

    inputs: dict[str, str] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)


def read_program(path: Path) -> Program:
    """Read either form.

    Raises:
        FormatError: damaged, or with control flow.
    """
    try:
        return _read_pir(path) if path.suffix == ".json" else _read_description(path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError(f"its program is damaged: {type(error).__name__}: {error}", path=str(path)) from error


def _read_pir(path: Path) -> Program:
    data = json.loads(read_file(path, MAX_TEXT))
    if data["base_code"]["magic"] != "pir":
        raise FormatError("is no program of Paddle 3", path=str(path))
    blocks = [block for region in data["program"]["regions"] for block in region["blocks"]]
    if len(blocks) != 1:
        raise FormatError(f"has {len(blocks)} blocks: control flow has no form in a graph", path=str(path))
    program, names = Program(), {0: ""}
    for entry in blocks[0]["ops"]:
        kind = entry["#"]
        if kind == "p":
            name = str(entry["A"][3])
            _note(program, names, entry["O"], name)
            if entry["OA"][0]:
                program.parameters.append(name)
            continue
        if entry.get("regions"):
            raise FormatError("control flow has no form in a graph", path=str(path), op=str(kind))
        attributes = {str(a["N"]): _attribute(a["AT"]) for a in entry["A"]}
        if kind == "1.data":
            name = str(attributes["name"])
            _note(program, names, entry["O"][0], name)
            program.inputs[name] = str(attributes["dtype"])
            continue
        inputs: list[Value] = [names[int(i["%"])] for i in entry["I"]]
        if kind == "1.fetch":
            program.outputs.append((str(inputs[0]), str(attributes["name"])))
            continue
        outputs: list[Value] = [_note(program, names, out, f"%{out['%']}") for out in entry["O"]]
        program.ops.append(Op(str(kind).replace("0.", "builtin.").replace("1.", ""), inputs, outputs, attributes))
    return program


def _note(program: Program, names: dict[int, str], out: Mapping[str, Any], name: str) -> str:
    names[int(out["%"])] = name
    kind = out.get("TT", {})
    if kind.get("#") == "0.t_dtensor":
        program.shapes[name] = [int(n) for n in kind["D"][1]]
    return name


def _attribute(value: Mapping[str, Any]) -> Any:
    data = value.get("D")
    if value["#"].endswith(".a_array"):
        return [_attribute(item) for item in data or []]
    if isinstance(data, str) and value["#"].endswith(("f32", "f64")):
        return float(data)
    return data


# Operation of version 2 -> operation of version 3 and the names of its inputs and outputs in order.
OLD: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "batch_norm": ("batch_norm_", ("X", "Mean", "Variance", "Scale", "Bias"), ("Y",)),
    "concat": ("concat", ("X", "AxisTensor"), ("Out",)),
    "conv2d": ("conv2d", ("Input", "Filter"), ("Output",)),
    "conv2d_transpose": ("conv2d_transpose", ("Input", "Filter"), ("Output",)),
    "depthwise_conv2d": ("depthwise_conv2d", ("Input", "Filter"), ("Output",)),
    "layer_norm": ("layer_norm", ("X", "Scale", "Bias"), ("Y",)),
    "group_norm": ("group_norm", ("X", "Scale", "Bias"), ("Y",)),
    "lookup_table_v2": ("embedding", ("Ids", "W"), ("Out",)),
    "matmul_v2": ("matmul", ("X", "Y"), ("Out",)),
    "matmul": ("matmul", ("X", "Y"), ("Out",)),
    "mul": ("mul", ("X", "Y"), ("Out",)),
    "shape": ("shape", ("Input",), ("Out",)),
    "slice": ("slice", ("Input",), ("Out",)),
    "stack": ("stack", ("X",), ("Y",)),
    "split": ("split", ("X",), ("Out",)),
    "rnn": ("rnn", ("Input", "PreState", "WeightList", "SequenceLength"), ("Out", "DropoutState", "State", "Reserve")),
    "where": ("where", ("Condition", "X", "Y"), ("Out",)),
    **{f"elementwise_{a}": (b, ("X", "Y"), ("Out",)) for a, b in {
        "add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "max": "maximum", "min": "minimum",
        "pow": "elementwise_pow",
    }.items()},
    **{a: (b, ("X",), ("Out",)) for a, b in {
        "flatten_contiguous_range": "flatten", "reshape2": "reshape", "transpose2": "transpose", "squeeze2": "squeeze",
        "unsqueeze2": "unsqueeze", "reduce_mean": "mean", "reduce_sum": "sum", "reduce_max": "max", "reduce_min": "min",
        "hard_swish": "hardswish", "hard_sigmoid": "hardsigmoid", "arg_max": "argmax", "expand_v2": "expand",
        "fill_constant": "full", "fill_constant_batch_size_like": "full_batch_size_like",
    }.items()},
}  # fmt: skip
RENAMED = {
    "trans_x": "transpose_x", "trans_y": "transpose_y", "transpose_X": "transpose_x", "transpose_Y": "transpose_y",
    "ksize": "kernel_size", "dim": "axis", "keep_dim": "keepdim", "pooling_type": "pooling_type", "alpha": "alpha",
}  # fmt: skip


def _read_description(path: Path) -> Program:
    wire = Wire(read_file(path, MAX_TEXT), str(path))
    blocks = [part for part in wire.fields() if part.number == 1]
    if len(blocks) != 1:
        raise FormatError(f"has {len(blocks)} blocks: control flow has no form in a graph", path=str(path))
    program = Program()
    dtypes: dict[str, int] = {}
    for part in list(wire.fields(blocks[0])):
        if part.number == 3:  # VarDesc
            _variable(wire, part, program, dtypes)
    for part in list(wire.fields(blocks[0])):
        if part.number == 4:  # OpDesc
            _operation(wire, part, program, dtypes)
    return program


def _variable(wire: Wire, part: Field, program: Program, dtypes: dict[str, int]) -> None:
    name, persistable, kind = "", False, 0
    for item in wire.fields(part):
        if item.number == 1:
            name = wire.text(item)
        elif item.number == 3 and item.kind == VARINT:
            persistable = bool(item.value)
        elif item.number == 2:  # VarType: 1 kind, 3 LoDTensorDesc
            for inner in wire.fields(item):
                if inner.number == 1 and inner.kind == VARINT:
                    kind = inner.value
                elif inner.number == 3:
                    dims: list[int] = []
                    for lod in wire.fields(inner):
                        if lod.number == 1 and lod.kind == BYTES:  # TensorDesc: 1 type, 2 dims
                            for desc in wire.fields(lod):
                                if desc.number == 1 and desc.kind == VARINT:
                                    dtypes[name or "?"] = desc.value
                                elif desc.number == 2:
                                    dims += wire.integers(desc)
                    program.shapes[name or "?"] = dims
    for table in (program.shapes, dtypes):
        if "?" in table:
            table[name] = table.pop("?")  # type: ignore[assignment,index]
    if persistable and kind == 7:  # LOD_TENSOR; feed and fetch lists are persistable too
        program.parameters.append(name)


def _operation(wire: Wire, part: Field, program: Program, dtypes: dict[str, int]) -> None:
    name = ""
    inputs: dict[str, list[str]] = {}
    outputs: dict[str, list[str]] = {}
    attributes: dict[str, Any] = {}
    for item in wire.fields(part):
        if item.number == 3:
            name = wire.text(item)
        elif item.number in (1, 2):  # Var: 1 parameter, 2 arguments
            parts = list(wire.fields(item))
            key = next((wire.text(p) for p in parts if p.number == 1), "")
            (inputs if item.number == 1 else outputs)[key] = [wire.text(p) for p in parts if p.number == 2]
        elif item.number == 4:
            key, value = _old_attribute(wire, item)
            attributes[RENAMED.get(key, key)] = value
    if name == "feed":
        (target,) = outputs["Out"]
        program.inputs[target] = {2: "int32", 3: "int64", 6: "float64"}.get(dtypes.get(target, 5), "float32")
        return
    if name == "fetch":
        (source,) = inputs["X"]
        program.outputs.append((source, source))
        return
    new, ins, outs = OLD.get(name, (name, ("X",), ("Out",)))
    unknown = {key for key, names in inputs.items() if names} - set(ins)
    if unknown:
        raise FormatError(f"inputs {sorted(unknown)} are not known here", path=wire.path, op=name)
    many = {"concat": "X", "stack": "X", "rnn": "PreState WeightList"}.get(new, "").split()
    ordered: list[Value] = [list(inputs.get(key, [])) if key in many else (inputs.get(key) or [""])[0] for key in ins]
    results: list[Value] = []
    for key in outs:
        names = outputs.get(key) or [""]
        results.append(list(names) if new == "split" or key == "State" else names[0])
    program.ops.append(Op(new, ordered, results, {**attributes, "version": 2}))


def _old_attribute(wire: Wire, part: Field) -> tuple[str, Any]:
    """Attr: 1 name, 2 kind, 3 i, 4 f, 5 s, 6 ints, 7 floats, 8 strings, 10 b, 11 bools, 13 l, 15 longs."""
    name, kind = "", 0
    values: list[Any] = []
    for item in wire.fields(part):
        if item.number == 1:
            name = wire.text(item)
        elif item.number == 2 and item.kind == VARINT:
            kind = item.value
        elif item.number in (3, 10, 13):
            values.append(wire.integer(item))
        elif item.number == 4:
            values.append(wire.real(item))
        elif item.number in (5, 8) and item.end - item.start <= 1 << 16:
            values.append(wire.text(item))
        elif item.number in (6, 11, 15):
            values += wire.integers(item)
        elif item.number == 7:
            values += [float(x) for x in wire.array(item, "<f4")]
    if kind in (3, 4, 5, 7, 11):  # lists
        return name, values
    value = values[-1] if values else None
    return name, bool(value) if kind == 6 else value
