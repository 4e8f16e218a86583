"""State dicts as networks: weights without an architecture, which a template, the caller's module or the names complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lockstep.core.errors import FormatError
from lockstep.interop.chains import Layer, chain, groups_of, image_layout
from lockstep.interop.pytorch.state import read_state
from lockstep.interop.traced import parse_shapes, trace
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About
from lockstep.models.graph.module import GraphModule

TRUNKS = ("network", "trunk", "body", "encoder", "shared", "backbone", "features", "torso", "fc")
"""Names of chains that the others stand on, where their widths agree."""
INPUT = "observation"


def read_state_dict(
    path: Path, *, activation: str = "", module: nn.Module | None = None, shapes: str = ""
) -> GraphModule:
    """Read weights that `torch.save(model.state_dict())` or safetensors wrote.

    Args:
        activation: between the layers of chains ("actor.0.weight", "actor.2.weight", ...), such as "tanh": the file does not
            tell.
        module: the network itself; the weights are put into it and it is traced. Its class decides then, not names.
        shapes: of the module's inputs, such as "obs=4" (without the batch).

    Raises:
        FormatError: damaged, or weights that are no chains of dense layers and Atari convolutions.
    """
    path = Path(path)
    tensors = read_state(path)
    if module is not None:
        return _through_module(module, tensors, shapes, path)
    if not activation:
        raise FormatError(
            "holds weights and no architecture; give activation='tanh' (or relu, ...) where they are chains of layers, "
            f"else module=YOUR_MODULE with shapes='obs=4'. Weights: {sorted(tensors)[:6]}",
            path=str(path),
        )
    try:
        return _through_names(tensors, activation)
    except FormatError as error:
        raise FormatError(error.reason, path=str(path), op=error.op) from error


def _through_module(module: nn.Module, tensors: Mapping[str, torch.Tensor], shapes: str, path: Path) -> GraphModule:
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise FormatError(f"does not fit {type(module).__name__}: {str(error)[:300]}", path=str(path)) from error
    inputs = parse_shapes(shapes, str(path))
    if not inputs:
        raise FormatError("the module's inputs are not known; give shapes='obs=4'", path=str(path))
    return trace(module, inputs, [], about=About(format="torch"), path=str(path))


def _through_names(tensors: Mapping[str, torch.Tensor], word: str) -> GraphModule:
    groups = groups_of(tensors)
    used = {f"{layer.name}.{part}" for layers in groups.values() for layer in layers for part in ("weight", "bias")}
    rest = sorted(set(tensors) - used - {name for name in tensors if "log_std" in name or "logstd" in name})
    if rest or not groups:
        raise FormatError(f"weights {rest[:4]} belong to no chain of layers; give module=YOUR_MODULE")
    make = GraphBuilder()
    trunk = next((name for name in TRUNKS if name in groups and _carries(groups, name)), "")
    first = groups[trunk or next(iter(groups))]
    x = make.input(INPUT, shape=image_layout(first))
    if trunk:
        x = chain(make, x, groups.pop(trunk), word, last=word)
    for name, layers in groups.items():
        if layers[0].weight.shape[1:] != first[0].weight.shape[1:] and not trunk:
            raise FormatError(f"chains {list(groups)} read inputs of several widths; give module=YOUR_MODULE")
        make.output(chain(make, x, layers, word), name, shape=("rows", None))
    return make.build(about=About(format="torch", log_std=log_std_of(tensors)))


def _carries(groups: Mapping[str, list[Layer]], trunk: str) -> bool:
    width = groups[trunk][-1].weight.shape[0]
    others = [layers for name, layers in groups.items() if name != trunk]
    return bool(others) and all(layers[0].weight.ndim == 2 and layers[0].weight.shape[1] == width for layers in others)


def log_std_of(tensors: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
    """A vector called log_std or actor_logstd, else nothing."""
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] in ("log_std", "actor_logstd", "logstd") and tensor.numel() == tensor.shape[-1]:
            return tuple(float(x) for x in tensor.reshape(-1))
    return ()
