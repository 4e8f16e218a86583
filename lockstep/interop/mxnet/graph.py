"""An MXNet graph as a module: nodes run in the order of the file; variables found in `.params` are its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lockstep.core.errors import FormatError, InputError, LockstepError, unknown_name
from lockstep.interop.mxnet.layers import LAYERS, LayerFunction
from lockstep.interop.mxnet.ops import LABELLED, OPS
from lockstep.interop.mxnet.reader import Node, Params, Symbol, read_params, read_symbol

_AUXILIARY = ("moving_mean", "moving_var")
_FIXED = "gamma that counts as 1"
_HARMLESS = frozenset(
    [
        *(
            "workspace",
            "cudnn_tune",
            "cudnn_off",
            "num_args",
            "grad_scale",
            "ignore_label",
            "use_ignore",
            "normalization",
        ),
        *("out_grad", "smooth_alpha", "ctx", "ctx_group", "lr_mult", "wd_mult", "weight_lr_mult", "force_mirroring"),
        *("mirror_stage", "margin", "use_linear", "regularization_coefficient", "sparse_grad", "key_var_num", "is_int"),
    ]
)
"""Attributes that tell MXNet how to compute or train, not what."""


@dataclass(frozen=True)
class Call:
    """A node's function with where its inputs lie; `layer` functions are also told whether the module is training."""

    node: Node
    function: LayerFunction
    inputs: tuple[tuple[int, int], ...]


class MXNetNetwork(nn.Module):
    """A network of MXNet; every argument is a Parameter, auxiliary states are buffers.

    `input_names` are the variables without a value in the order of the file (labels of `*Output` heads are dropped),
    `input_shapes` what the file says of them, None where it says nothing. `output_names` are those of the heads.
    `unused` lists arrays of the file that the graph does not read.

    Raises:
        FormatError: an operator or attribute is unknown, or a weight is missing; names file, node and operator.
    """

    def __init__(self, symbol: Symbol, params: Params, params_path: str = "") -> None:
        super().__init__()
        self.symbol = symbol
        self.weights = nn.ParameterDict()
        self.statistics = nn.Module()
        self._keys: dict[int, tuple[str, bool]] = {}
        nodes = symbol.nodes
        needed = _needed(symbol)
        arrays = _match_names(params, nodes, params_path)
        roles = _roles(symbol, needed)
        used: set[str] = set()
        inputs: dict[str, tuple[int, ...] | None] = {}
        self.inputs: list[tuple[int, str]] = []
        self.calls: list[Call] = []
        for number in sorted(needed):
            node = nodes[number]
            if node.op == "null":
                role = roles.get(number, "")
                if node.name in arrays:
                    used.add(node.name)
                    self._add_weight(
                        node, arrays[node.name], node.name in params.auxiliary or role in (*_AUXILIARY, _FIXED)
                    )
                elif role not in ("", "data"):
                    raise FormatError(f"holds no array {node.name!r}, a {role} of {symbol.path}", path=params_path)
                else:
                    self.inputs.append((number, node.name))
                    inputs[node.name] = _shape(node)
                continue
            self.calls.append(Call(node, _function(node), _inputs_of(node, self._hidden_states(node, arrays, used))))
        self.unused = tuple(name for name in arrays if name not in used)
        if arrays and not used:
            raise FormatError(
                f"its arrays ({unknown_name('name', nodes[0].name, arrays)[:200]}) are not those of {symbol.path}",
                path=params_path,
            )
        self.input_names = tuple(inputs)
        self.input_shapes = inputs
        self.output_names = tuple(_output_name(nodes[number], index) for number, index in symbol.heads)

    def _add_weight(self, node: Node, array: np.ndarray, is_statistic: bool) -> None:
        if not is_statistic and array.dtype.kind not in "fb" and array.dtype != np.float32:
            is_statistic = True  # integers cannot be trained
        value = torch.from_numpy(array.astype("float32") if array.dtype.kind == "f" else array.copy())
        key = node.name.replace(".", "_")
        while key in self.weights or key in self.statistics._buffers or key in dir(self.statistics):
            key += "_"
        self._keys[node.number] = (key, is_statistic)
        if is_statistic:
            self.statistics.register_buffer(key, value)
        else:
            self.weights[key] = nn.Parameter(value)

    def _hidden_states(self, node: Node, arrays: Mapping[str, np.ndarray], used: set[str]) -> list[tuple[int, int]]:
        """References to the auxiliary states of a BatchNorm, which files before v0.9 do not list as inputs."""
        if not node.op.startswith("BatchNorm") or len(node.inputs) != 3:
            return []
        references = []
        for index, name in enumerate(_AUXILIARY):
            full = f"{node.name}_{name}"
            if full not in arrays:
                raise node.fail(f"the weights hold no {full!r}")
            number = -(2 * node.number + index + 1)
            stand_in = Node(number, "null", full, {}, (), node.path)
            self._add_weight(stand_in, arrays[full], True)
            used.add(full)
            references.append((number, 0))
        return references

    def key_of(self, number: int) -> str:
        """The key in `weights` of a variable by its node's number; empty where it is none."""
        key, is_statistic = self._keys.get(number, ("", True))
        return "" if is_statistic else key

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Inputs in the order of `input_names`, or by name -> the output, or outputs in the order of the heads.

        Raises:
            InputError: an input is missing or does not fit; names the node.
        """
        given = {**dict(zip(self.input_names, inputs, strict=False)), **named}
        if len(inputs) > len(self.input_names) or set(given) != set(self.input_names):
            raise InputError(f"got inputs {list(given)}; the network reads {list(self.input_names)}", field="inputs")
        values: dict[tuple[int, int], Tensor] = {(number, 0): given[name] for number, name in self.inputs}
        for number, (key, is_statistic) in self._keys.items():
            values[number, 0] = self.statistics.get_buffer(key) if is_statistic else self.weights[key]
        device = next(iter(values.values())).device
        for call in self.calls:
            if not all(reference in values for reference in call.inputs):
                raise InputError(
                    f"{call.node.name} ({call.node.op}): an input is an output that its node lacks", field="heads"
                )
            operands = [values[reference] for reference in call.inputs]
            if torch.compiler.is_compiling():
                out = call.function(operands, self.training)
            else:
                out = self._run(call, operands)
            for index, value in enumerate((out,) if isinstance(out, Tensor) else out):
                values[call.node.number, index] = value if call.inputs else value.to(device)
        for reference in self.symbol.heads:
            if reference not in values:
                raise InputError(
                    f"{self.symbol.path}: output {reference[1]} of {self.symbol.nodes[reference[0]].name!r} does not exist",
                    field="heads",
                )
        outputs = tuple(values[reference] for reference in self.symbol.heads)
        return outputs[0] if len(outputs) == 1 else outputs

    def _run(self, call: Call, operands: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        try:
            return call.function(operands, self.training)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, LockstepError):
                raise InputError(f"{self.symbol.path}: {error}", field=call.node.name) from error
            shapes = [tuple(operand.shape) for operand in operands]
            raise InputError(
                f"{self.symbol.path}: node {call.node.number} {call.node.name!r} ({call.node.op}) cannot take inputs of "
                f"shapes {shapes}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                field=call.node.name,
            ) from error


def _function(node: Node) -> LayerFunction:
    if node.op in LAYERS:
        function = LAYERS[node.op][0](node)
    elif node.op in OPS:
        plain = OPS[node.op](node)

        def function(inputs: object, training: bool) -> Tensor | tuple[Tensor, ...]:
            return plain(*inputs)  # type: ignore[misc]
    else:
        raise node.fail(unknown_name("operator", node.op, [*LAYERS, *OPS])[:200])
    unread = [
        name
        for name in node.attributes
        if name not in node.read and name not in _HARMLESS and not name.startswith("__")
    ]
    if unread:
        raise node.fail(f"attribute {unread[0]}={node.attributes[unread[0]][:40]!r} is not supported")
    return function


def _inputs_of(node: Node, more: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    if node.op in LABELLED:
        return node.inputs[:1]
    least = 1 if node.op in OPS and node.op not in ("_zeros", "_ones", "_full", "_arange") else 0
    if node.op in LAYERS:
        least = _num_inputs(node)
    if len(node.inputs) + len(more) < least:
        raise node.fail(f"has {len(node.inputs)} inputs, at least {least} were expected")
    return (*node.inputs, *more)


def _num_inputs(node: Node) -> int:
    names = LAYERS[node.op][1]
    if node.op == "LeakyReLU":
        return 2 if node.string("act_type", "leaky") == "prelu" else 1
    if node.op == "RNN":
        return 4 if node.string("mode", "") == "lstm" else 3
    default = node.op == "Deconvolution"
    return len(names) - (1 if "bias" in names and node.flag("no_bias", default) else 0)


def _needed(symbol: Symbol) -> set[int]:
    """Nodes that an output depends on, labels left out."""
    waiting = [number for number, _ in symbol.heads]
    needed: set[int] = set()
    while waiting:
        number = waiting.pop()
        if number not in needed:
            needed.add(number)
            node = symbol.nodes[number]
            waiting += [source for source, _ in (node.inputs[:1] if node.op in LABELLED else node.inputs)]
    return needed


def _roles(symbol: Symbol, needed: set[int]) -> dict[int, str]:
    """What a variable is to the layer that reads it: "weight", "moving_mean", ...; absent where it is just a value."""
    roles: dict[int, str] = {}
    for number in sorted(needed):
        node = symbol.nodes[number]
        if node.op in LAYERS:
            for (source, _), role in zip(node.inputs, LAYERS[node.op][1], strict=False):
                if role != "data" and symbol.nodes[source].op == "null":
                    fixed = role == "gamma" and node.op.startswith("BatchNorm") and node.flag("fix_gamma", True)
                    roles[source] = _FIXED if fixed else role
    return roles


def _match_names(params: Params, nodes: tuple[Node, ...], path: str) -> dict[str, np.ndarray]:
    """Arrays by the graph's names; Gluon's old `save_params` leaves out the block's own prefix."""
    names = {node.name for node in nodes if node.op == "null"}
    arrays = dict(params.arrays)
    if not arrays or names & set(arrays):
        return arrays
    first = next(iter(arrays))
    for name in names:
        prefix = name.removesuffix(first)
        if name.endswith(first) and prefix and all(prefix + other in names for other in arrays):
            return {prefix + other: value for other, value in arrays.items()}
    if all("." in name for name in arrays):
        raise FormatError(
            "names arrays by the structure of Gluon blocks (save_parameters); export the network with its symbol "
            "(HybridBlock.export), or load these arrays with read_params",
            path=path,
        )
    return arrays


def _shape(node: Node) -> tuple[int, ...] | None:
    if "__shape__" not in node.attributes:
        return None
    shape = tuple(int(dim or 0) for dim in node.integers("__shape__"))
    return shape or None


def _output_name(node: Node, index: int) -> str:
    return node.name if index == 0 else f"{node.name}_{index}"


def load_mxnet(symbol: str | Path, params: str | Path | None = None) -> MXNetNetwork:
    """Load an MXNet network without MXNet; every weight is trainable.

    Args:
        symbol: `NAME-symbol.json`.
        params: `NAME-0000.params`; None for a graph without weights.

    Raises:
        FormatError: a file is missing, damaged or not known; names file, node or offset, and operator.
    """
    arrays = Params({}) if params is None else read_params(params)
    return MXNetNetwork(read_symbol(symbol), arrays, "" if params is None else str(params)).eval()
