"""Caffe's LSTM and RNN over [T, M, ...] with the continuation marker `cont` [T, M]: 0 where a sequence starts.

Without `expose_hidden` the state before the first step is zero. (Caffe keeps the last batch's there; a first `cont` of 0, as
its documentation asks for, makes both equal.)

Legend: T time steps, M sequences, K input features, H hidden units.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep.interop.caffe.layers import Source
from lockstep.interop.caffe.ops import Shapes
from lockstep.interop.caffe.reader import LayerSpec
from lockstep.interop.loops import loop


class _Bottoms:
    """What the inputs after `cont` are: a static input, and states where they are exposed."""

    def __init__(self, layer: LayerSpec, shapes: Shapes, num_states: int) -> None:
        param = layer.param("recurrent_param")
        self.num = param.integer("num_output", 0)
        self.num_states = num_states if param.flag("expose_hidden", False) else 0
        extra = len(shapes) - 2 - self.num_states
        if len(shapes) < 2 or extra not in (0, 1) or len(layer.tops) != 1 + self.num_states:
            raise layer.fail(
                f"{len(shapes)} inputs and {len(layer.tops)} outputs; x, cont, an optional static input and "
                f"{self.num_states} states were expected"
            )
        if len(shapes[0]) < 2 or tuple(shapes[1]) != tuple(shapes[0][:2]):
            raise layer.fail(f"x {shapes[0]} and cont {shapes[1]}: [T, M, ...] and [T, M] were expected")
        self.has_static = extra == 1
        self.num_features = math.prod(shapes[0][2:])
        self.num_static = math.prod(shapes[2][1:]) if self.has_static else 0

    def split(self, rest: tuple[Tensor, ...], x_TMK: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        static = rest[0] if self.has_static else None
        states = list(rest[self.has_static :])
        if not states:
            zero = x_TMK.new_zeros(x_TMK.shape[1], self.num)
            return static, [zero, zero]
        return static, [state.reshape(x_TMK.shape[1], self.num) for state in states]


def _lstm_step(states: list[Tensor], slices: list[Tensor], outer: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    (h, c), (inputs, cont_M), (hidden_weight,) = states, slices, outer
    keep = cont_M[:, None]
    i, f, o, g = (inputs + F.linear(h * keep, hidden_weight)).chunk(4, 1)
    c = keep * torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return [h, c], [h]


def _rnn_step(states: list[Tensor], slices: list[Tensor], outer: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    (inputs, cont_M), (hidden_weight,) = slices, outer
    h = torch.tanh(inputs + F.linear(states[0] * cont_M[:, None], hidden_weight))
    return [h], [h]


class LSTM(nn.Module):
    """Gates in the order i, f, o, g (LRCN, Donahue et al. 2015): the cell is kept where `cont` is 1."""

    def __init__(self, layer: LayerSpec, shapes: Shapes, source: Source) -> None:
        super().__init__()
        param = layer.param("recurrent_param")
        self.bottoms = _Bottoms(layer, shapes, 2)
        num = self.bottoms.num
        weight, bias = param.message("weight_filler"), param.message("bias_filler")
        self.input_weight = nn.Parameter(source.take((4 * num, self.bottoms.num_features), weight))
        self.bias = nn.Parameter(source.take((4 * num,), bias))
        self.static_weight: nn.Parameter | None = None
        if self.bottoms.has_static:
            self.static_weight = nn.Parameter(source.take((4 * num, self.bottoms.num_static), weight))
        self.hidden_weight = nn.Parameter(source.take((4 * num, num), weight))
        self.blobs = tuple(name for name, _ in self.named_parameters())

    def forward(self, x: Tensor, cont_TM: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x [T, M, ...] -> h [T, M, H], and h_T, c_T [1, M, H] where exposed."""
        x_TMK = x.flatten(2)
        static, (h, c) = self.bottoms.split(rest, x_TMK)
        if x.device.type == "meta":  # only shapes are asked for
            h_TMH = x.new_empty(*x.shape[:2], self.bottoms.num)
            return (h_TMH, h[None], c[None]) if self.bottoms.num_states else h_TMH
        inputs = F.linear(x_TMK, self.input_weight, self.bias)
        if static is not None and self.static_weight is not None:
            inputs = inputs + F.linear(static.flatten(1), self.static_weight)
        (h, c), (h_TMH,) = loop(_lstm_step, [h, c], [inputs, cont_TM], [self.hidden_weight])
        return (h_TMH, h[None], c[None]) if self.bottoms.num_states else h_TMH


class RNN(nn.Module):
    """h = tanh(W h cont + V x + b), output tanh(U h + d)."""

    def __init__(self, layer: LayerSpec, shapes: Shapes, source: Source) -> None:
        super().__init__()
        param = layer.param("recurrent_param")
        self.bottoms = _Bottoms(layer, shapes, 1)
        num = self.bottoms.num
        weight, bias = param.message("weight_filler"), param.message("bias_filler")
        self.input_weight = nn.Parameter(source.take((num, self.bottoms.num_features), weight))
        self.bias = nn.Parameter(source.take((num,), bias))
        self.static_weight: nn.Parameter | None = None
        if self.bottoms.has_static:
            self.static_weight = nn.Parameter(source.take((num, self.bottoms.num_static), weight))
        self.hidden_weight = nn.Parameter(source.take((num, num), weight))
        self.out_weight = nn.Parameter(source.take((num, num), weight))
        self.out_bias = nn.Parameter(source.take((num,), bias))
        self.blobs = tuple(name for name, _ in self.named_parameters())

    def forward(self, x: Tensor, cont_TM: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x [T, M, ...] -> output [T, M, H], and h_T [1, M, H] where exposed."""
        x_TMK = x.flatten(2)
        static, states = self.bottoms.split(rest, x_TMK)
        h = states[0]
        if x.device.type == "meta":  # only shapes are asked for
            out = x.new_empty(*x.shape[:2], self.bottoms.num)
            return (out, h[None]) if self.bottoms.num_states else out
        inputs = F.linear(x_TMK, self.input_weight, self.bias)
        if static is not None and self.static_weight is not None:
            inputs = inputs + F.linear(static.flatten(1), self.static_weight)
        (h,), (h_TMH,) = loop(_rnn_step, [h], [inputs, cont_TM], [self.hidden_weight])
        out = torch.tanh(F.linear(h_TMH, self.out_weight, self.out_bias))
        return (out, h[None]) if self.bottoms.num_states else out
