"""A graph made ready to run: functions in place of names, and when each value is last needed.

    values of inputs, stored tensors -> step 1 -> step 2 -> ... -> outputs

A step whose inputs are all `Host` runs on Python numbers where its operation can, so shape arithmetic never touches a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.core.errors import FormatError, LockstepError, unknown_name
from lockstep.models.graph.call import Call
from lockstep.models.graph.graph import Graph, Node
from lockstep.models.graph.ops import CONTROL, HOST, OPS, Function
from lockstep.models.graph.values import Host, Value

Scope = dict[str, Value]

# What torch raises for operands that do not fit each other, and Python for attributes that make no sense.
MISFITS = (
    RuntimeError,
    ValueError,
    IndexError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)


@dataclass(frozen=True)
class Step:
    """One node. `dead` names the values that nobody needs after it."""

    call: Call
    function: Function | None
    host: Function | None
    control: Function | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class Program:
    """A compiled graph or body. `captures` are the outer names that it reads."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    captures: tuple[str, ...]

    def run(self, values: Sequence[Value], scope: Mapping[str, Value]) -> list[Value]:
        """Values of the outputs.

        Args:
            values: of the inputs, in order.
            scope: outer names: stored tensors and, for a body, what surrounds it.

        Raises:
            FormatError: operands that do not fit an operation; the message names it.
        """
        env: Scope = dict(scope)
        env.update(zip(self.inputs, values, strict=True))
        for step in self.steps:
            if torch.compiler.is_compiling():
                results = perform(step, env)
            else:
                try:
                    results = perform(step, env)
                except LockstepError as error:
                    if isinstance(error, FormatError) and not error.op:
                        raise FormatError(error.reason, path=error.path, op=_where(step)) from error
                    raise
                except MISFITS as error:
                    raise FormatError(_misfit(step, env, error), op=_where(step)) from error
            for name, result in zip(step.outputs, results, strict=False):
                env[name] = result
            for name in step.dead:
                env.pop(name, None)
        return [env[name] if name else None for name in self.outputs]


def perform(step: Step, env: Scope) -> Sequence[Value]:
    """Results of one step, as many as its function yields."""
    values = [env[name] if name else None for name in step.inputs]
    if step.control is not None:
        return step.control(step.call, env, *values)  # type: ignore[no-any-return]
    if step.host is not None and all(value is None or isinstance(value, Host) for value in values):
        result = step.host(step.call, *values)
        if result is not NotImplemented:
            return result if isinstance(result, tuple) else (result,)
    assert step.function is not None
    result = step.function(step.call, *values)
    return result if isinstance(result, tuple) else (result,)


def compile_graph(graph: Graph, opsets: Mapping[str, int], outer: frozenset[str] = frozenset()) -> Program:
    """Make a graph ready.

    Args:
        opsets: of the whole network; bodies have none of their own.
        outer: names that surround a body.

    Raises:
        FormatError: an operation that does not exist here, or a name that nothing defines.
    """
    defined = set(outer) | {port.name for port in graph.inputs} | set(graph.tensors)
    nodes: list[tuple[Node, dict[str, Any], list[str]]] = []
    captures: dict[str, None] = {}
    for node in graph.nodes:
        attributes, used = _attributes(node, opsets, frozenset(defined))
        for name in [*filter(None, node.inputs), *used]:
            if name not in defined:
                raise FormatError(
                    f"input {name!r} of node {node.name or node.outputs} is not defined before it", op=node.op
                )
            if name in outer:
                captures[name] = None
        defined |= set(filter(None, node.outputs))
        nodes.append((node, attributes, used))
    outputs = tuple(port.name for port in graph.outputs)
    for name in outputs:
        if name not in defined and name:
            raise FormatError(f"output {name!r} is not computed by any node")
        if name in outer:
            captures[name] = None
    return Program(tuple(port.name for port in graph.inputs), outputs, _steps(nodes, outputs, opsets), tuple(captures))


def _steps(
    nodes: list[tuple[Node, dict[str, Any], list[str]]], outputs: tuple[str, ...], opsets: Mapping[str, int]
) -> tuple[Step, ...]:
    """From last to first, because a value dies after its last use."""
    needed = set(outputs)
    own = {name for node, _, _ in nodes for name in node.outputs if name}
    steps: list[Step] = []
    for node, attributes, used in reversed(nodes):
        wanted = tuple(bool(name) and name in needed for name in node.outputs)
        if not any(wanted):
            continue
        reads = {name for name in [*node.inputs, *used] if name}
        dead = tuple(sorted(name for name in (reads | set(filter(None, node.outputs))) & own if name not in needed))
        needed |= reads
        steps.append(_step(node, attributes, wanted, dead, opsets))
    return tuple(reversed(steps))


def _step(
    node: Node, attributes: dict[str, Any], wanted: tuple[bool, ...], dead: tuple[str, ...], opsets: Mapping[str, int]
) -> Step:
    if not isinstance(node.op, str):
        # A damaged file's names can be bytes that are no UTF-8.
        raise FormatError(f"an operation is called {node.op!r}; expected text")
    domain, _, _ = node.op.rpartition(".")
    if node.op not in OPS and node.op not in CONTROL:
        raise FormatError(unknown_name("operation", node.op, _near(node.op)), op=node.op)
    call = Call(node.op, attributes, opsets.get(domain, 1), len(node.outputs), wanted)
    return Step(
        call,
        OPS.get(node.op),
        HOST.get(node.op),
        CONTROL.get(node.op),
        node.inputs,
        tuple(name or f"\0{index}" for index, name in enumerate(node.outputs)),
        dead,
        node.name,
    )


def _near(op: str) -> list[str]:
    """Known operations that begin alike; the whole list would hide the message."""
    known = [*OPS, *CONTROL]
    return [name for name in known if name[:2].lower() == op[:2].lower()] or known


def _attributes(node: Node, opsets: Mapping[str, int], defined: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
    """Attributes with bodies compiled, and the outer names that those read."""
    attributes: dict[str, Any] = {}
    used: list[str] = []
    for name, value in node.attributes.items():
        if isinstance(value, Graph):
            value = compile_graph(value, opsets, defined)
            used += value.captures
        attributes[name] = value
    return attributes, used


def _where(step: Step) -> str:
    return f"{step.call.op} {step.name!r}" if step.name else step.call.op


def _misfit(step: Step, env: Scope, error: BaseException) -> str:
    shown = ", ".join(f"{name} {_describe(env.get(name))}" for name in step.inputs if name)
    text = " ".join(str(error).split())[:300]
    return f"does not fit its inputs ({shown}): {text}"


def _describe(value: Value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
