"""Recurrences over time through the compiled kernels.

Legend: T time steps, N environments, B sampled transitions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels import native


def _addresses(*tensors: Tensor | None) -> tuple[list[int | None], list[Tensor | None]]:
    """Pointers, and the contiguous tensors that must outlive the call."""
    kept = [None if t is None else native.contiguous(t) for t in tensors]
    return [None if t is None else t.data_ptr() for t in kept], kept


def gae(
    reward_TN: Tensor,
    value_TN: Tensor,
    next_value_TN: Tensor,
    terminated_TN: Tensor,
    ended_TN: Tensor,
    valid_TN: Tensor | None,
    gamma: float,
    lam: float,
) -> Tensor:
    """See `lockstep.kernels.gae`."""
    inputs, _kept = _addresses(reward_TN, value_TN, next_value_TN, terminated_TN, ended_TN, valid_TN)
    advantage_TN = torch.empty(reward_TN.shape, dtype=torch.float32)
    native.lib().ls_gae(*inputs, gamma, lam, advantage_TN.data_ptr(), *reward_TN.shape)
    return advantage_TN


def discounted_return(reward_TN: Tensor, ended_TN: Tensor, start_N: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.discounted_return`."""
    inputs, _kept = _addresses(reward_TN, ended_TN, start_N)
    running_TN = torch.empty(reward_TN.shape, dtype=torch.float32)
    end_N = torch.empty(start_N.shape, dtype=torch.float32)
    native.lib().ls_discounted_return(*inputs, gamma, running_TN.data_ptr(), end_N.data_ptr(), *reward_TN.shape)
    return running_TN, end_N


def vtrace(
    log_rhos_TN: Tensor,
    reward_TN: Tensor,
    value_TN: Tensor,
    next_value_TN: Tensor,
    terminated_TN: Tensor,
    ended_TN: Tensor,
    valid_TN: Tensor | None,
    gamma: float,
    lam: float,
    rho_bar: float,
    c_bar: float,
) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.vtrace`."""
    inputs, _kept = _addresses(log_rhos_TN, reward_TN, value_TN, next_value_TN, terminated_TN, ended_TN, valid_TN)
    vs_TN = torch.empty(reward_TN.shape, dtype=torch.float32)
    advantage_TN = torch.empty(reward_TN.shape, dtype=torch.float32)
    native.lib().ls_vtrace(
        *inputs, gamma, lam, rho_bar, c_bar, vs_TN.data_ptr(), advantage_TN.data_ptr(), *reward_TN.shape
    )
    return vs_TN, advantage_TN


def nstep_returns(
    reward_TN: Tensor,
    terminated_TN: Tensor,
    ended_TN: Tensor,
    t_B: Tensor,
    env_B: Tensor,
    newest: int,
    num_steps: int,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `lockstep.kernels.nstep_returns`."""
    inputs, _kept = _addresses(reward_TN, terminated_TN, ended_TN, t_B, env_B)
    num = len(t_B)
    return_B, discount_B = torch.empty(num, dtype=torch.float32), torch.empty(num, dtype=torch.float32)
    last_B = torch.empty(num, dtype=torch.int64)
    native.lib().ls_nstep_returns(
        *inputs,
        newest,
        num_steps,
        gamma,
        return_B.data_ptr(),
        discount_B.data_ptr(),
        last_B.data_ptr(),
        *reward_TN.shape,
        num,
    )
    return return_B, discount_B, last_B
