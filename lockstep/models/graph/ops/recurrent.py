"""LSTM, GRU and RNN with every attribute that ONNX gives them.

Legend: T steps, N rows, D directions, K input features, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.values import Value, to_tensors

Function = Callable[..., Any]
Activation = Callable[[Tensor], Tensor]

# Name -> (parameters it takes, their defaults, function).
ACTIVATIONS: dict[str, tuple[tuple[float, ...], Callable[..., Tensor]]] = {
    "affine": ((1.0, 0.0), lambda x, a, b: a * x + b),
    "elu": ((1.0,), lambda x, a: F.elu(x, a)),
    "hardsigmoid": ((0.2, 0.5), lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0)),
    "leakyrelu": ((0.01,), lambda x, a: F.leaky_relu(x, a)),
    "relu": ((), torch.relu),
    "scaledtanh": ((1.0, 1.0), lambda x, a, b: a * torch.tanh(b * x)),
    "sigmoid": ((), torch.sigmoid),
    "softplus": ((), F.softplus),
    "softsign": ((), F.softsign),
    "tanh": ((), torch.tanh),
    "thresholdedrelu": ((1.0,), lambda x, a: torch.where(x > a, x, torch.zeros_like(x))),
}


@dataclass(frozen=True)
class Cell:
    """One direction: weights, activations and what else decides a step."""

    weight: Tensor
    recurrent: Tensor
    bias: Tensor | None
    peephole: Tensor | None
    activations: list[Activation]
    clip: float | None
    flags: tuple[bool, bool]
    """(input_forget, linear_before_reset)"""

    def clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else torch.clamp(x, -self.clip, self.clip)


State = tuple[Tensor, ...]
Step = Callable[[Cell, Tensor, State], State]


def lstm_step(cell: Cell, pre: Tensor, state: State) -> State:
    """Gates i, o, f, c (Hochreiter & Schmidhuber 1997; peepholes after Gers & Schmidhuber 2000)."""
    h, c = state
    f, g, out = cell.activations
    pre = pre + h @ cell.recurrent.mT
    i, o, forget, candidate = pre.chunk(4, dim=-1)
    if cell.peephole is not None:
        peep_i, peep_o, peep_f = cell.peephole.chunk(3)
        i, forget = i + peep_i * c, forget + peep_f * c
    i = f(cell.clipped(i))
    forget = 1 - i if cell.flags[0] else f(cell.clipped(forget))
    new = forget * c + i * g(cell.clipped(candidate))
    if cell.peephole is not None:
        o = o + peep_o * new
    return f(cell.clipped(o)) * out(new), new


def gru_step(cell: Cell, pre: Tensor, state: State) -> State:
    """Gates z, r, h (Cho et al. 2014); `linear_before_reset` multiplies the reset gate after the product."""
    (h,) = state
    f, g = cell.activations
    size = h.shape[-1]
    gates = pre[..., : 2 * size] + h @ cell.recurrent[: 2 * size].mT
    bias = None
    if cell.bias is not None:
        gates = gates + cell.bias[3 * size : 5 * size]
        bias = cell.bias[5 * size :]
    z, r = f(cell.clipped(gates)).chunk(2, dim=-1)
    if cell.flags[1]:
        hidden = r * F.linear(h, cell.recurrent[2 * size :], bias)
    else:
        hidden = F.linear(r * h, cell.recurrent[2 * size :], bias)
    candidate = g(cell.clipped(pre[..., 2 * size :] + hidden))
    return ((1 - z) * candidate + z * h,)


def rnn_step(cell: Cell, pre: Tensor, state: State) -> State:
    (h,) = state
    return (cell.activations[0](cell.clipped(pre + h @ cell.recurrent.mT)),)


def recurrent(step: Step, num_gates: int, defaults: tuple[str, ...], num_states: int) -> Function:
    """The operation around a step: directions, sequence lengths, layouts, initial states."""

    def run(
        call: Call,
        x: Value,
        weight: Value,
        recurrence: Value,
        bias: Value = None,
        lengths: Value = None,
        initial_h: Value = None,
        initial_c: Value = None,
        peephole: Value = None,
    ) -> Any:
        x, weight, recurrence, bias, lengths, initial_h, initial_c, peephole = to_tensors(
            (x, weight, recurrence, bias, lengths, initial_h, initial_c, peephole)
        )
        batch_first = bool(call.get("layout", 0))
        if batch_first:
            x = x.transpose(0, 1)
            initial_h, initial_c = (s if s is None else s.transpose(0, 1) for s in (initial_h, initial_c))
        num_directions, size = weight.shape[0], recurrence.shape[-1]
        activations = _activations(call, defaults, num_directions)
        outs, lasts = [], []
        for d in range(num_directions):
            cell = Cell(
                weight[d],
                recurrence[d],
                None if bias is None else bias[d],
                None if peephole is None else peephole[d],
                activations[d],
                call.get("clip", None),
                (bool(call.get("input_forget", 0)), bool(call.get("linear_before_reset", 0))),
            )
            state = tuple(
                x.new_zeros(x.shape[1], size) if s is None else s[d] for s in (initial_h, initial_c)[:num_states]
            )
            backward = d == 1 or call.get("direction", "forward") == "reverse"
            out, last = _direction(step, cell, x, state, lengths, backward=backward, num_gates=num_gates)
            outs.append(out)
            lasts.append(last)
        y = torch.stack(outs, dim=1)
        states = [torch.stack([last[i] for last in lasts]) for i in range(num_states)]
        if batch_first:
            y, states = y.permute(2, 0, 1, 3), [s.transpose(0, 1) for s in states]
        return (y, *states)

    return run


def _direction(
    step: Step, cell: Cell, x: Tensor, state: State, lengths: Tensor | None, *, backward: bool, num_gates: int
) -> tuple[Tensor, State]:
    """[T, N, K] -> ([T, N, H], last state). Beyond its length a row's state rests and its output is zero."""
    size = state[0].shape[-1]
    bias = cell.bias
    if bias is not None:
        # A GRU adds its recurrent bias inside of the step.
        bias = bias[: num_gates * size] if num_gates == 3 else bias[: num_gates * size] + bias[num_gates * size :]
    pre = F.linear(x, cell.weight, bias)
    num = x.shape[0]
    outs: list[Tensor] = []
    for t in range(num - 1, -1, -1) if backward else range(num):
        new = step(cell, pre[t], state)
        if lengths is not None:
            alive = (t < lengths).unsqueeze(1)
            outs.append(torch.where(alive, new[0], torch.zeros_like(new[0])))
            state = tuple(torch.where(alive, a, b) for a, b in zip(new, state, strict=True))
        else:
            outs.append(new[0])
            state = new
    if not outs:
        return x.new_zeros(0, x.shape[1], size), state
    return torch.stack(outs[::-1] if backward else outs), state


def _activations(call: Call, defaults: tuple[str, ...], num_directions: int) -> list[list[Activation]]:
    names = list(call.get("activations", ())) or list(defaults) * num_directions
    alphas, betas = list(call.get("activation_alpha", ())), list(call.get("activation_beta", ()))
    if len(names) != len(defaults) * num_directions:
        raise FormatError(f"{len(names)} activations; expected {len(defaults) * num_directions}", op=call.op)
    made: list[Activation] = []
    for name in names:
        if name.lower() not in ACTIVATIONS:
            raise FormatError(f"unknown activation {name!r}", op=call.op)
        given, fn = ACTIVATIONS[name.lower()]
        numbers = list(given)
        for i, source in enumerate((alphas, betas)[: len(given)]):
            if source:
                numbers[i] = source.pop(0)
        made.append(_bound(fn, tuple(numbers)))
    per = len(defaults)
    return [made[i * per : (i + 1) * per] for i in range(num_directions)]


def _bound(fn: Callable[..., Tensor], numbers: tuple[float, ...]) -> Activation:
    return lambda x: fn(x, *numbers)


OPS: dict[str, Function] = {
    "GRU": recurrent(gru_step, 3, ("Sigmoid", "Tanh"), 1),
    "LSTM": recurrent(lstm_step, 4, ("Sigmoid", "Tanh", "Tanh"), 2),
    "RNN": recurrent(rnn_step, 1, ("Tanh",), 1),
}
