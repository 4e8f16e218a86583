"""Gates as operators of a saved `torch.export` program; see `lockstep.kernels.mlp.opaque`.

Legend: M rows, H hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels import native
from lockstep.kernels.gates import cpu, naive


def _run_lstm(pre_M4H: Tensor, c_MH: Tensor) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = (cpu if native.usable() else naive).lstm_gates(pre_M4H, c_MH)
    return out


def _run_gru(in_M3H: Tensor, re_M3H: Tensor, h_MH: Tensor) -> Tensor:
    out: Tensor = (cpu if native.usable() else naive).gru_gates(in_M3H, re_M3H, h_MH)
    return out


_lstm = torch.library.custom_op(
    "lockstep::lstm_gates", _run_lstm, mutates_args=(), schema="(Tensor pre, Tensor c) -> (Tensor, Tensor)"
)
_gru = torch.library.custom_op(
    "lockstep::gru_gates", _run_gru, mutates_args=(), schema="(Tensor inputs, Tensor re, Tensor h) -> Tensor"
)


@_lstm.register_fake
def _lstm_shape(pre_M4H: Tensor, c_MH: Tensor) -> tuple[Tensor, Tensor]:
    return c_MH.new_empty(c_MH.shape), c_MH.new_empty(c_MH.shape)


@_gru.register_fake
def _gru_shape(in_M3H: Tensor, re_M3H: Tensor, h_MH: Tensor) -> Tensor:
    return h_MH.new_empty(h_MH.shape)


def lstm_gates(pre_M4H: Tensor, c_MH: Tensor) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.lstm_gates`."""
    out: tuple[Tensor, Tensor] = _lstm(pre_M4H, c_MH)
    return out


def gru_gates(in_M3H: Tensor, re_M3H: Tensor, h_MH: Tensor) -> Tensor:
    """See `lockstep.kernels.gru_gates`."""
    out: Tensor = _gru(in_M3H, re_M3H, h_MH)
    return out
