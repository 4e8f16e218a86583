"""Recurrent networks that read whole sequences, turned into networks that read one step and carry their state.

Exporters save an LSTM with its initial state inside of the graph. A policy meets one observation at a time, so the initial
states of LSTM, GRU, RNN and Scan become inputs and their last states outputs; the weights stay where they are.

Legend: T steps, N rows, H hidden units.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lockstep.core.errors import FormatError
from lockstep.models.graph.graph import Graph, Node, Port
from lockstep.models.graph.module import GraphModule

# Operation -> (places of initial states among the inputs, places of last states among the outputs).
PLACES = {"LSTM": ((5, 6), (1, 2)), "GRU": ((5,), (1,)), "RNN": ((5,), (1,))}
TOLERANCE = 1e-5
STATE_PREFIX = "state."


@dataclass(frozen=True)
class Slot:
    """One carried state: its input and output in the graph, both [1, N, H]."""

    input: str
    output: str
    size: int


def carried(module: GraphModule, time_axis: int) -> tuple[Graph, tuple[Slot, ...]] | None:
    """The graph with its states as further inputs and outputs, None where that cannot be: no recurrent node, one that looks
    ahead, an initial state other than zero, or steps that depend on each other in another way.

    Args:
        module: a network of one input [N, T, K] or [T, N, K].
        time_axis: of T.
    """
    graph = module.graph
    names = [node for node in graph.nodes if node.op in PLACES or node.op == "Scan"]
    x = _probe(graph, time_axis)
    if not names or x is None:
        return None
    if any(node.attributes.get("direction", "forward") != "forward" or node.attributes.get("layout") for node in names):
        return None
    slots: list[Slot] = []
    initial: list[str] = []
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op in PLACES:
            recurrence = module.graph.tensors.get(node.inputs[2])
            known = recurrence.shape[-1] if recurrence is not None and recurrence.shape else 0
            size = int(node.attributes.get("hidden_size", known))
            if not size:
                return None
            node, own, given = _opened(node, len(slots), size)
            slots += own
            initial += given
        elif node.op == "Scan":
            before, node, after, own, given = _opened_scan(node, len(slots), module, x)
            if not own:
                return None
            slots += own
            initial += given
            nodes += [*before, node, *after]
            continue
        nodes.append(node)
    ports = tuple(Port(slot.input, "float32", (1, None, slot.size)) for slot in slots)
    outs = tuple(Port(slot.output, "float32", (1, None, slot.size)) for slot in slots)
    stepping = replace(graph, inputs=(*graph.inputs, *ports), nodes=tuple(nodes), outputs=(*graph.outputs, *outs))
    return (stepping, tuple(slots)) if _is_faithful(module, stepping, slots, initial, time_axis, x) else None


def _probe(graph: Graph, time_axis: int) -> Tensor | None:
    """Random numbers, two rows of three steps, for a network of one sequence."""
    shape = graph.inputs[0].shape if len(graph.inputs) == 1 else None
    size = None if shape is None or len(shape) != 3 else shape[2]
    if not isinstance(size, int):
        return None
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0))
    return x.transpose(0, 1).contiguous() if time_axis == 0 else x


@torch.no_grad()
def _opened_scan(
    node: Node, first: int, module: GraphModule, x: Tensor
) -> tuple[list[Node], Node, list[Node], list[Slot], list[str]]:
    """As `_opened`, with the nodes in front and behind that give states their axis of layers; no slots where a state is no
    [N, H]."""
    num = len(node.inputs) - int(node.attributes["num_scan_inputs"])
    inputs, given = list(node.inputs), list(node.inputs[:num])
    try:
        starts = GraphModule(replace(module.graph, outputs=tuple(map(Port, given))), module.state_dict()).outputs([x])
    except (FormatError, RuntimeError):
        return [], node, [], [], []
    if any(s.ndim != 2 or s.shape[0] != 2 for s in starts):
        return [], node, [], [], []
    before, after, slots = [], [], []
    for i, start in enumerate(starts):
        name, inner = f"{STATE_PREFIX}{first + i}", f"state#{first + i}"
        call = json.dumps([[{"$input": 0}, 0], {}])
        before.append(Node("aten.squeeze.dim", (name,), (inner,), {"call": call}))
        inputs[i] = inner
        after.append(Node("aten.unsqueeze.default", (node.outputs[i],), (f"next.{first + i}",), {"call": call}))
        slots.append(Slot(name, f"next.{first + i}", int(start.shape[1])))
    return before, replace(node, inputs=tuple(inputs)), after, slots, given


def _opened(node: Node, first: int, size: int) -> tuple[Node, list[Slot], list[str]]:
    """(the node with open states, its slots, names of the initial states that it had)."""
    ins, outs = PLACES[node.op]
    inputs = [*node.inputs, *[""] * (max(ins) + 1 - len(node.inputs))]
    outputs = [*node.outputs, *[""] * (max(outs) + 1 - len(node.outputs))]
    slots, given = [], []
    for i, (place, out) in enumerate(zip(ins, outs, strict=True)):
        if inputs[place]:
            given.append(inputs[place])
        name = f"{STATE_PREFIX}{first + i}"
        inputs[place] = name
        outputs[out] = outputs[out] or f"next.{first + i}"
        slots.append(Slot(name, outputs[out], size))
    return replace(node, inputs=tuple(inputs), outputs=tuple(outputs)), slots, given


@torch.no_grad()
def _is_faithful(
    module: GraphModule, stepping: Graph, slots: list[Slot], initial: list[str], time_axis: int, x: Tensor
) -> bool:
    """Whether the steps one by one give what the whole sequence gives, from states of zero."""
    tensors = dict(module.state_dict())
    try:
        starts = GraphModule(replace(module.graph, outputs=tuple(map(Port, initial))), tensors).outputs([x])
        whole = module.outputs([x])
        one = GraphModule(stepping, tensors)
        states: list[Tensor] = [torch.zeros(1, 2, slot.size) for slot in slots]
        rows = []
        for t in range(3):
            out = one.outputs([x.narrow(time_axis, t, 1), *states])
            states = out[len(whole) :]
            rows.append(out[: len(whole)])
    except (FormatError, RuntimeError, AttributeError, TypeError):
        return False
    if any(bool(s.abs().max() > 0) for s in starts):
        return False
    together = [torch.cat([row[i] for row in rows], dim=time_axis) for i in range(len(whole))]
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE) for a, b in zip(together, whole, strict=True)
    )
