"""Recurrent cells: the gates of one step, and whole sequences in which the state restarts where an episode does.

Legend: T time steps, M rows, H hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.gates import cpu, naive, opaque

IMPLEMENTATIONS = {"naive": naive, "cpu": cpu, "opaque": opaque}


def lstm_gates(pre_M4H: Tensor, c_MH: Tensor) -> tuple[Tensor, Tensor]:
    """h' = σ(o) tanh(c'), c' = σ(f) c + σ(i) tanh(g) (Gers et al. 2000).

    Args:
        pre_M4H: gates before their activation, in the order i, f, g, o.
        c_MH: cell state.

    Returns:
        (h', c'), differentiable with respect to both arguments. A row's bits do not depend on the other rows.
    """
    _check("pre", pre_M4H, 4, "c", c_MH)
    out: tuple[Tensor, Tensor] = IMPLEMENTATIONS[native.choose(pre_M4H)].lstm_gates(pre_M4H, c_MH)
    return out


def gru_gates(in_M3H: Tensor, re_M3H: Tensor, h_MH: Tensor) -> Tensor:
    """h' = (1 − z) n + z h with r = σ(in_r + re_r), z = σ(in_z + re_z), n = tanh(in_n + r re_n) (Cho et al. 2014).

    Args:
        in_M3H: what the input contributes, in the order r, z, n.
        re_M3H: what the state contributes.
        h_MH: state.

    Returns:
        h', differentiable with respect to all arguments. A row's bits do not depend on the other rows.
    """
    _check("in", in_M3H, 3, "h", h_MH)
    _check("re", re_M3H, 3, "h", h_MH)
    out: Tensor = IMPLEMENTATIONS[native.choose(in_M3H)].gru_gates(in_M3H, re_M3H, h_MH)
    return out


def lstm_sequence(
    inputs_TM4H: Tensor, weight: Tensor, bias: Tensor, h_MH: Tensor, c_MH: Tensor, starts_TM: Tensor
) -> tuple[Tensor, Tensor]:
    """T steps of `lstm_gates` with pre = inputs + h weight + bias; where `starts` is true h and c are zero before it.

    Args:
        inputs_TM4H: what the input contributes to the gates.
        weight: [H, 4H]. bias: [4H].
        starts_TM: bool.

    Returns:
        (h_TMH, c after the last step [M, H]), differentiable with respect to all float arguments.
    """
    _check_sequence(inputs_TM4H, weight, bias, h_MH, starts_TM, 4)
    _check("inputs", inputs_TM4H[0], 4, "c", c_MH)
    arguments = (inputs_TM4H, weight, bias, h_MH, c_MH, starts_TM)
    if native.choose(inputs_TM4H) == "cpu":
        return cpu.lstm_sequence(*arguments)
    # A loop over the ops of one step, whichever form those take.
    return naive.lstm_sequence(*arguments, lstm_gates)


def gru_sequence(inputs_TM3H: Tensor, weight: Tensor, bias: Tensor, h_MH: Tensor, starts_TM: Tensor) -> Tensor:
    """T steps of `gru_gates` with re = h weight + bias; where `starts` is true h is zero before the step.

    Args:
        inputs_TM3H: what the input contributes to the gates.
        weight: [H, 3H]. bias: [3H].
        starts_TM: bool.

    Returns:
        h_TMH, differentiable with respect to all float arguments.
    """
    _check_sequence(inputs_TM3H, weight, bias, h_MH, starts_TM, 3)
    arguments = (inputs_TM3H, weight, bias, h_MH, starts_TM)
    if native.choose(inputs_TM3H) == "cpu":
        return cpu.gru_sequence(*arguments)
    return naive.gru_sequence(*arguments, gru_gates)


def _check(name: str, gates: Tensor, num_gates: int, state_name: str, state_MH: Tensor) -> None:
    num, hidden = state_MH.shape
    if gates.shape != (num, num_gates * hidden) or gates.dtype is not state_MH.dtype:
        raise InputError(
            f"{name} is {gates.dtype} {tuple(gates.shape)}; with {state_name} {state_MH.dtype} {(num, hidden)} expected "
            f"{state_MH.dtype} {(num, num_gates * hidden)}",
            field=name,
        )


def _check_sequence(
    inputs: Tensor, weight: Tensor, bias: Tensor, h_MH: Tensor, starts_TM: Tensor, num_gates: int
) -> None:
    if inputs.dim() != 3 or inputs.shape[0] < 1:
        raise InputError(f"inputs are [T, M, {num_gates}H] with T >= 1; got {tuple(inputs.shape)}", field="inputs")
    _check("inputs", inputs[0], num_gates, "h", h_MH)
    hidden = h_MH.shape[1]
    if weight.shape != (hidden, num_gates * hidden) or bias.shape != (num_gates * hidden,):
        raise InputError(
            f"weight and bias are {tuple(weight.shape)} and {tuple(bias.shape)}; expected "
            f"{(hidden, num_gates * hidden)} and {(num_gates * hidden,)}",
            field="weight",
        )
    if starts_TM.shape != inputs.shape[:2] or starts_TM.dtype is not torch.bool:
        raise InputError(
            f"starts is {starts_TM.dtype} {tuple(starts_TM.shape)}; expected bool {tuple(inputs.shape[:2])}",
            field="starts",
        )
