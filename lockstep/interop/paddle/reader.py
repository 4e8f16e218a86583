"""Networks of PaddlePaddle without Paddle: inference programs of versions 2 and 3 with their weights, and `.pdparams`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from lockstep.core.errors import ConfigError, FormatError
from lockstep.interop.chains import Layer, chain, groups_of, image_layout
from lockstep.interop.paddle.lowering import Lowering
from lockstep.interop.paddle.ops import apply
from lockstep.interop.paddle.programs import Program, read_program
from lockstep.interop.paddle.weights import read_pdiparams, read_pdparams
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About, Dim
from lockstep.models.graph.module import GraphModule


def read_paddle(
    path: Path,
    *,
    params: str | Path = "",
    program: str | Path = "",
    activation: str = "",
    through: Literal["", "paddle2onnx"] = "",
    python: str = "",
) -> GraphModule:
    """Read a network.

    Args:
        path: `NAME.json` or `NAME.pdmodel`, with `NAME.pdiparams` beside it; or `NAME.pdparams`, whose program is `NAME.json`,
            `NAME.pdmodel` or `inference_model/NAME.json` beside it.
        params, program: the other file, where it is called otherwise.
        activation: of a `.pdparams` without a program, between the layers of each chain.
        through: "paddle2onnx": let Paddle's own converter read the program, in an interpreter that has it.
        python: that interpreter.

    Raises:
        FormatError: damaged, a companion is missing, or an operation is not known.
        MissingExtraError: `through` is wished and no interpreter has the converter.
    """
    path = given = Path(path)
    if path.suffix == ".pdparams":
        return _read_state(path, Path(program) if program else None, activation)
    if path.suffix == ".pdiparams":
        found = [path.with_suffix(".json"), path.with_suffix(".pdmodel")]
        params, path = path, Path(program) if program else next((file for file in found if file.exists()), found[0])
    weights = Path(params) if params else path.with_suffix(".pdiparams")
    for file, option in ((path, "program"), (weights, "params")):
        if not file.exists():
            raise FormatError(f"its companion {file} does not exist; give it with {option}=", path=str(given))
    if through == "paddle2onnx":
        from lockstep.interop.converters import paddle_to_onnx

        return paddle_to_onnx(path, weights, python=python)
    if through:
        raise ConfigError(f"through={through!r}; paddle2onnx is known")
    parsed = read_program(path)
    return _build(parsed, read_pdiparams(weights, sorted(parsed.parameters), program=path), path)


def _build(program: Program, tensors: dict[str, torch.Tensor], path: Path) -> GraphModule:
    make = GraphBuilder()
    low = Lowering(make, program.shapes, tensors)
    try:
        for name, dtype in program.inputs.items():
            shape = tuple(_dim(i, n) for i, n in enumerate(program.shapes.get(name, [])))
            low.names[name] = make.input(name, dtype=dtype, shape=shape)
        for name, tensor in tensors.items():
            low.names[name] = make.tensor(name, tensor)
        for op in program.ops:
            apply(low, op)
        for value, name in program.outputs:
            make.output(low.value(value), name)
        if not program.outputs:
            raise FormatError("yields nothing")
        is_image = any(len(program.shapes.get(name, [])) == 4 for name in program.inputs)
        about = About(format="paddle", producer="paddlepaddle", layout="NCHW" if is_image else "")
        return make.build(about=about)
    except FormatError as error:
        raise FormatError(error.reason, path=str(path), op=error.op) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise FormatError(f"its program is damaged: {type(error).__name__}: {error}", path=str(path)) from error


def _dim(index: int, size: int) -> Dim:
    if size >= 0:
        return size
    return "rows" if index == 0 else None


def _read_state(path: Path, program: Path | None, activation: str) -> GraphModule:
    tensors, names = read_pdparams(path)
    nearby = (
        path.with_suffix(".json"),
        path.with_suffix(".pdmodel"),
        path.parent / "inference_model" / f"{path.stem}.json",
    )
    program = program or next((file for file in nearby if file.exists()), None)
    if program is not None:
        return _with_program(read_program(program), tensors, names, path)
    if not activation:
        raise FormatError(
            f"holds weights and no architecture, and {nearby[0].name} is not beside it; give program=, or activation='tanh' "
            f"where they are chains of layers. Weights: {sorted(tensors)[:6]}",
            path=str(path),
        )
    make = GraphBuilder()
    try:
        groups = groups_of({name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in tensors.items()})
        first: list[Layer] = next(iter(groups.values()))
        x = make.input("observation", shape=image_layout(first))
        for name, layers in groups.items():
            make.output(chain(make, x, layers, activation), name, shape=("rows", None))
        return make.build(about=About(format="paddle"))
    except FormatError as error:
        raise FormatError(error.reason, path=str(path), op=error.op) from error


def _with_program(program: Program, tensors: dict[str, torch.Tensor], names: dict[str, str], path: Path) -> GraphModule:
    """The tensors by the names that the program has for them; a state dict's own are attribute paths."""
    known = {names.get(key, key): tensor for key, tensor in tensors.items()}
    missing = [name for name in program.parameters if name not in known]
    if missing:
        raise FormatError(f"does not belong to its program: {missing[:4]} are missing", path=str(path))
    chosen = {name: known[name] for name in program.parameters}
    wrong = [name for name, t in chosen.items() if list(t.shape) != program.shapes.get(name, list(t.shape))]
    if wrong:
        raise FormatError(f"does not belong to its program: {wrong[:4]} have other shapes", path=str(path))
    return _build(program, chosen, path)
