"""Any of our readers' modules as a graph: the module is traced with free batch sizes, and every operator becomes a node.

module -> torch.export -> operators of PyTorch -> `aten.*` nodes of a GraphModule, weights by their names
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node as TracedNode

from lockstep.core.errors import FormatError
from lockstep.interop.loops import OPERATOR, Body, recording
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About, Dim
from lockstep.models.graph.module import GraphModule
from lockstep.models.graph.ops import OPS

_INTEGERS: dict[Callable[..., Any], str] = {
    operator.add: "lockstep.IntegerAdd",
    operator.sub: "lockstep.IntegerSub",
    operator.mul: "lockstep.IntegerMul",
    operator.floordiv: "lockstep.IntegerFloorDiv",
    operator.mod: "lockstep.IntegerMod",
    torch.sym_max: "lockstep.IntegerMax",
    torch.sym_min: "lockstep.IntegerMin",
}
_CHECKS = ("_assert", "sym_constrain", "_guards_fn")


class _Positional(nn.Module):
    """A module as a function of its inputs alone, which always returns a tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.module(*inputs)
        return (out,) if isinstance(out, Tensor) else tuple(out)


class _Step(nn.Module):
    """A loop's body as a function of its states, slices and tensors from outside."""

    def __init__(self, body: Body, num_states: int, num_scanned: int) -> None:
        super().__init__()
        self.body, self.num_states, self.num_scanned = body, num_states, num_scanned

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        cut = self.num_states + self.num_scanned
        given = (inputs[: self.num_states], inputs[self.num_states : cut], inputs[cut:])
        ends, results = self.body(*(list(part) for part in given))
        return (*ends, *results)


def trace(
    module: nn.Module,
    inputs: Mapping[str, Sequence[Dim]],
    output_names: Sequence[str],
    *,
    about: About,
    path: str,
    original: Mapping[str, bytes] | None = None,
) -> GraphModule:
    """The module in evaluation as a graph.

    Args:
        module: reads the inputs in order.
        inputs: shapes by name; a dimension given as a name is free.
        output_names: of what it returns.
        about: what is known of the network.
        path: file that an error names.
        original: files that travel along.

    Raises:
        FormatError: it cannot be traced with these free dimensions, or uses an operator that graphs do not have.
    """
    # Sizes that fit nothing else, so that no free one is taken for a constant.
    names = sorted({dim for shape in inputs.values() for dim in shape if isinstance(dim, str)})
    sizes = {name: 3 + 2 * index for index, name in enumerate(names)}
    examples = tuple(torch.zeros(*(_size(dim, sizes) for dim in shape)) for shape in inputs.values())
    auto = torch.export.Dim.AUTO
    dynamic = tuple({i: auto for i, dim in enumerate(shape) if isinstance(dim, str)} for shape in inputs.values())
    with recording() as bodies:
        program = _exported(_Positional(module.eval()), examples, {"inputs": dynamic}, path)
        _check_free(program, inputs, about.time_axis, path)
        return from_program(program, inputs, output_names, about=about, path=path, original=original, bodies=bodies)


def _exported(module: nn.Module, examples: tuple[Tensor, ...], dynamic: Any, path: str) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, examples, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # the tracer's errors have no common root
        raise FormatError(f"cannot be traced as a graph: {str(error).splitlines()[0][:300]}", path=path) from error


def _check_free(
    program: torch.export.ExportedProgram, inputs: Mapping[str, Sequence[Dim]], time_axis: int | None, path: str
) -> None:
    """The tracer takes a free dimension for the example's size where the module asks for that size, and says nothing. It also
    does so with the steps of a fused recurrence, which stays one node that runs at any length."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int  # brings sympy: seconds that most never need

    found = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    given = (found[name] for name in program.graph_signature.user_inputs if isinstance(name, str))
    for (name, shape), value in zip(inputs.items(), given, strict=True):
        for place, dim in enumerate(shape):
            if isinstance(dim, str) and place != time_axis and is_concrete_int(value.shape[place]):
                raise FormatError(
                    f"input {name!r}, dimension {place} ({dim}), was taken as {value.shape[place]} while tracing; a free one "
                    "was expected: the network holds for that size only",
                    path=path,
                )


def from_program(
    program: torch.export.ExportedProgram,
    inputs: Mapping[str, Sequence[Dim]],
    output_names: Sequence[str],
    *,
    about: About,
    path: str,
    original: Mapping[str, bytes] | None = None,
    dtypes: Mapping[str, str] | None = None,
    bodies: Sequence[Body] = (),
) -> GraphModule:
    """A traced program as a graph; see `trace`. Without `output_names` the outputs are called output, output_1, ...; `bodies`
    are those of the loops that it kept.

    Raises:
        FormatError: it uses an operator that graphs do not have.
    """
    builder = GraphBuilder()
    values = _Values(builder, program, path, bodies)
    for name, shape in inputs.items():
        builder.input(name, shape=shape, dtype=(dtypes or {}).get(name, "float32"))
    values.place_inputs(list(inputs))
    results = values.walk()
    names = output_names or ["output", *(f"output_{i}" for i in range(1, len(results)))][: len(results)]
    for result, name in zip(results, names, strict=True):
        builder.output(result, name)
    return builder.build(about=about, original=original)


def parse_shapes(text: str, path: str) -> dict[str, tuple[Dim, ...]]:
    """Shapes of inputs in words, the batch in front of each.

    Raises:
        FormatError: not of that form.

    >>> parse_shapes("data=4,84,84; age=1", "")
    {'data': ('batch', 4, 84, 84), 'age': ('batch', 1)}
    """
    found: dict[str, tuple[Dim, ...]] = {}
    for part in filter(None, text.split(";")):
        name, _, dims = part.partition("=")
        try:
            found[name.strip()] = ("batch", *(int(dim) for dim in dims.split(",")))
        except ValueError as error:
            raise FormatError(f"shapes={part!r}: 'data=4,84,84' was expected", path=path) from error
    return found


def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
    assert dim is not None
    return sizes[dim] if isinstance(dim, str) else int(dim)


class _Values:
    """Names of traced values in the graph that is being built."""

    def __init__(
        self, builder: GraphBuilder, program: torch.export.ExportedProgram, path: str, bodies: Sequence[Body] = ()
    ) -> None:
        self.builder = builder
        self.program = program
        self.path = path
        self.bodies = bodies
        self.names: dict[str, str] = {}

    def walk(self) -> list[str]:
        """Add every call; the names of the results."""
        results: list[str] = []
        for node in self.program.graph_module.graph.nodes:
            if node.op == "call_function":
                self.add(node)
            elif node.op == "output":
                results = [self.name(result) for result in node.args[0]]
        return results

    def place_inputs(self, names: list[str]) -> None:
        """Match placeholders with inputs, weights and constants."""
        signature = self.program.graph_signature
        state = {**dict(self.program.state_dict), **dict(self.program.constants)}
        given = iter(names)
        for spec in signature.input_specs:
            placeholder = spec.arg.name  # type: ignore[union-attr]
            if spec.kind == torch.export.graph_signature.InputKind.USER_INPUT:
                self.names[placeholder] = next(given)
                continue
            target = spec.target or placeholder
            value = state[target]
            name = target.removeprefix("module.").removeprefix("weights.").removeprefix("layers.")
            is_parameter = isinstance(value, nn.Parameter) and value.requires_grad
            self.names[placeholder] = self.builder.tensor(name, value.detach(), trainable=is_parameter)

    def name(self, node: TracedNode) -> str:
        """A traced value's name here.

        Raises:
            FormatError: it is none.
        """
        if not isinstance(node, TracedNode) or node.name not in self.names:
            raise FormatError(f"an output {node!r:.60} is not a tensor of the graph", path=self.path)
        return self.names[node.name]

    def add(self, node: TracedNode) -> None:
        """Add one traced call."""
        target: Any = node.target
        if target is operator.getitem:
            first = self.name(node.args[0])  # type: ignore[arg-type]
            self.names[node.name] = f"{first}:{node.args[1]}" if node.args[1] else first
            return
        word = _INTEGERS.get(target) or str(target)
        if any(check in word for check in _CHECKS):
            return
        if word == OPERATOR:
            self._add_loop(node)
            return
        if word not in OPS:
            raise FormatError(
                "has no form in a graph; load the file with its framework's own reader", path=self.path, op=word
            )
        inputs: list[str] = []
        call = json.dumps([self._encode(list(node.args), inputs), self._encode(dict(node.kwargs), inputs)])
        outputs = self._outputs(node)
        self.builder.node(word, inputs, outputs=outputs, name=node.name, call=call)
        self.names[node.name] = outputs[0]

    def _add_loop(self, node: TracedNode) -> None:
        """A Scan. Its body is traced from the shapes that the loop met; weights it sees by their names outside."""
        arguments: Any = node.args
        states, scanned, outer, index = arguments
        given: list[Any] = [*states, *scanned, *outer]
        num_states, num_scanned = len(states), len(scanned)
        examples, dynamic = [], []
        for place, value in enumerate(given):
            is_scanned = num_states <= place < num_states + num_scanned
            shape = value.meta["val"].shape[1 if is_scanned else 0 :]
            free = [isinstance(size, torch.SymInt) for size in shape]
            dtype = value.meta["val"].dtype
            examples.append(
                torch.zeros([s.node.hint if f else s for s, f in zip(shape, free, strict=True)], dtype=dtype)
            )
            dynamic.append({i: torch.export.Dim.AUTO for i, is_free in enumerate(free) if is_free})
        step = _Step(self.bodies[index], num_states, num_scanned)
        program = _exported(step, tuple(examples), {"inputs": tuple(dynamic)}, self.path)
        inner = self.builder.body()
        ports = [
            inner.input(inner.fresh("slice" if i >= num_states else "state")) for i in range(len(given) - len(outer))
        ]
        values = _Values(inner, program, self.path, self.bodies)
        values.place_inputs([*ports, *(self.name(value) for value in outer)])
        for result in values.walk():
            inner.output(result)
        outputs = self._outputs(node)
        inputs = [self.name(value) for value in given[: num_states + num_scanned]]
        self.builder.node(
            "Scan", inputs, outputs=outputs, name=node.name, body=inner.graph(), num_scan_inputs=num_scanned
        )
        self.names[node.name] = outputs[0]

    def _outputs(self, node: TracedNode) -> list[str]:
        value = node.meta.get("val")
        num = len(value) if isinstance(value, list | tuple) else 1
        first = self.builder.fresh(node.name)
        return [first, *(f"{first}:{index}" for index in range(1, num))]

    def _encode(self, value: Any, inputs: list[str]) -> Any:
        if isinstance(value, TracedNode):
            inputs.append(self.name(value))
            return {"$input": len(inputs) - 1}
        if isinstance(value, list | tuple):
            return [self._encode(item, inputs) for item in value]
        if isinstance(value, dict):
            return {key: self._encode(item, inputs) for key, item in value.items()}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device | torch.layout | torch.memory_format):
            return {"$skip": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise FormatError(f"an argument {value!r:.60} has no form in a graph", path=self.path)
