"""Reference recurrent cells in plain torch. Legend: T time steps, M rows, H hidden units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lockstep.kernels.mlp import linear


def lstm_gates(pre_M4H: Tensor, c_MH: Tensor) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.lstm_gates`."""
    i, f, g, o = pre_M4H.chunk(4, dim=1)
    c = torch.sigmoid(f) * c_MH + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_gates(in_M3H: Tensor, re_M3H: Tensor, h_MH: Tensor) -> Tensor:
    """See `lockstep.kernels.gru_gates`."""
    in_r, in_z, in_n = in_M3H.chunk(3, dim=1)
    re_r, re_z, re_n = re_M3H.chunk(3, dim=1)
    z = torch.sigmoid(in_z + re_z)
    n = torch.tanh(in_n + torch.sigmoid(in_r + re_r) * re_n)
    return (1.0 - z) * n + z * h_MH


def lstm_sequence(
    inputs_TM4H: Tensor,
    weight: Tensor,
    bias: Tensor,
    h_MH: Tensor,
    c_MH: Tensor,
    starts_TM: Tensor,
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.lstm_sequence`; `step` is the op of one step."""
    h, c, outputs = h_MH, c_MH, []
    for inputs, starts in zip(inputs_TM4H.unbind(0), starts_TM.unbind(0), strict=True):
        h, c = h.masked_fill(starts.unsqueeze(1), 0.0), c.masked_fill(starts.unsqueeze(1), 0.0)
        h, c = step(linear(h, weight, bias) + inputs, c)
        outputs.append(h)
    return torch.stack(outputs), c


def gru_sequence(
    inputs_TM3H: Tensor,
    weight: Tensor,
    bias: Tensor,
    h_MH: Tensor,
    starts_TM: Tensor,
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """See `lockstep.kernels.gru_sequence`; `step` is the op of one step."""
    h, outputs = h_MH, []
    for inputs, starts in zip(inputs_TM3H.unbind(0), starts_TM.unbind(0), strict=True):
        h = h.masked_fill(starts.unsqueeze(1), 0.0)
        h = step(inputs, linear(h, weight, bias), h)
        outputs.append(h)
    return torch.stack(outputs)
