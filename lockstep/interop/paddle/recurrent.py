"""Paddle's `rnn`: LSTM, GRU and RNN of several layers and both directions as ONNX's operations.

Gates of Paddle's LSTM are i, f, c, o and of its GRU r, z, c; ONNX has i, o, f, c and z, r, h. The weights are put into ONNX's
order once, when they are read.
"""

from __future__ import annotations

from typing import Any

import torch

from lockstep.core.errors import FormatError
from lockstep.interop.paddle.lowering import Lowering
from lockstep.interop.paddle.programs import Op, Value

KINDS: dict[str, tuple[str, tuple[int, ...], int, dict[str, Any]]] = {
    "LSTM": ("LSTM", (0, 3, 1, 2), 2, {}),
    "GRU": ("GRU", (1, 0, 2), 1, {"linear_before_reset": 1}),
    "RNN_TANH": ("RNN", (0,), 1, {}),
    "RNN_RELU": ("RNN", (0,), 1, {"activations": ["Relu"]}),
}
"""Mode -> operation, order of its gates, number of states, attributes."""


def lower_rnn(low: Lowering, op: Op) -> list[Any]:
    """[output [T, N, D * H], "", states, ""].

    Raises:
        FormatError: an unknown mode, or weights that the program computes.
    """
    attributes = op.attributes
    if attributes.get("mode") not in KINDS:
        raise FormatError(f"of the mode {attributes.get('mode')!r}; {list(KINDS)} are read")
    kind, order, num_states, extra = KINDS[attributes["mode"]]
    num_layers, hidden = int(attributes["num_layers"]), int(attributes["hidden_size"])
    directions = 2 if attributes.get("is_bidirec") else 1
    weights = _weights(low, op.inputs[2], num_layers * directions, order, hidden)
    initial = _initial(low, op.inputs[1], num_states, num_layers, directions)
    lengths = low.value(op.inputs[3]) if len(op.inputs) > 3 else ""
    make, x = low.make, low.value(op.inputs[0])
    finals: list[list[str]] = [[] for _ in range(num_states)]
    for layer in range(num_layers):
        own = weights[layer * directions : (layer + 1) * directions]
        stored = [
            make.tensor(f"{own[0][0]}.{part}", torch.stack([tensors[index] for _, *tensors in own]))
            for index, part in enumerate(("weight", "recurrence", "bias"))
        ]
        outs = [make.fresh(kind) for _ in range(1 + num_states)]
        ones = {**extra, "activations": extra["activations"] * directions} if "activations" in extra else extra
        direction = "bidirectional" if directions == 2 else "forward"
        inputs = [x, *stored, lengths, *(states[layer] for states in initial)]
        make.node(kind, inputs, outputs=outs, hidden_size=hidden, direction=direction, **ones)
        for state, out in zip(finals, outs[1:], strict=True):
            state.append(out)
        if directions == 1:
            x = make.node("Squeeze", [outs[0], low.ints([1])])
        else:
            rows = make.node("Transpose", [outs[0]], perm=[0, 2, 1, 3])
            x = make.node("Reshape", [rows, low.ints([0, 0, -1])])
    states = [parts[0] if len(parts) == 1 else make.node("Concat", parts, axis=0) for parts in finals]
    return [x, "", states, ""]


def _weights(
    low: Lowering, value: Value, num: int, order: tuple[int, ...], hidden: int
) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(name, weight, recurrence, bias) of each layer and direction; Paddle lists all matrices before all biases."""
    names = low.many(value)
    if len(names) != 4 * num:
        raise FormatError(f"has {len(names)} weights; {4 * num} were expected")
    if any(name not in low.weights for name in names):
        raise FormatError("takes weights that the program computes")
    found = []
    for index in range(num):
        picked = [names[2 * index], names[2 * index + 1], names[2 * num + 2 * index], names[2 * num + 2 * index + 1]]
        tensors = [low.weights[name] for name in picked]
        if any(t.ndim not in (1, 2) or t.shape[0] != len(order) * hidden for t in tensors):
            raise FormatError(f"has weights {[list(t.shape) for t in tensors]} for {hidden} units")
        w, r, b, c = (torch.cat([t.split(hidden)[gate] for gate in order]) for t in tensors)
        found.append((picked[0], w, r, torch.cat([b, c])))
    return found


def _initial(low: Lowering, value: Value, num_states: int, num_layers: int, directions: int) -> list[list[str]]:
    """Initial states [D, N, H] by state and layer."""
    names = low.many(value)
    if len(names) != num_states:
        raise FormatError(f"has {len(names)} initial states; {num_states} were expected")
    if num_layers == 1:
        return [[name] for name in names]
    parts = []
    for name in names:
        outs = [low.make.fresh("state") for _ in range(num_layers)]
        low.make.node("Split", [name, low.ints([directions] * num_layers)], outputs=outs, axis=0)
        parts.append(outs)
    return parts
