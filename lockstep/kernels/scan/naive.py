"""Reference recurrences over time in plain torch.

Legend: T time steps, N environments, B sampled transitions.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    advantage_TN = torch.zeros_like(reward_TN)
    trace_N = torch.zeros_like(reward_TN[0])
    zero_N = torch.zeros_like(trace_N)
    for t in range(len(reward_TN) - 1, -1, -1):
        bootstrap_N = torch.where(terminated_TN[t], zero_N, next_value_TN[t])
        delta_N = reward_TN[t] + gamma * bootstrap_N - value_TN[t]
        now_N = delta_N + gamma * lam * torch.where(ended_TN[t], zero_N, trace_N)
        if valid_TN is None:
            trace_N = advantage_TN[t] = now_N
        else:
            advantage_TN[t] = torch.where(valid_TN[t], now_N, zero_N)
            trace_N = torch.where(valid_TN[t], now_N, trace_N)
    return advantage_TN


def discounted_return(reward_TN: Tensor, ended_TN: Tensor, start_N: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.discounted_return`."""
    running_TN = torch.empty_like(reward_TN)
    sum_N = start_N
    for t in range(len(reward_TN)):
        running_TN[t] = sum_N * gamma + reward_TN[t]
        sum_N = torch.where(ended_TN[t], torch.zeros_like(sum_N), running_TN[t])
    return running_TN, sum_N.clone()


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
    vs_TN, advantage_TN = value_TN.clone(), torch.zeros_like(value_TN)
    excess_N = torch.zeros_like(value_TN[0])
    zero_N = torch.zeros_like(excess_N)
    for t in range(len(reward_TN) - 1, -1, -1):
        w_N = log_rhos_TN[t].exp()
        rho_N, c_N = w_N.clamp(max=rho_bar), lam * w_N.clamp(max=c_bar)
        bootstrap_N = torch.where(terminated_TN[t], zero_N, next_value_TN[t])
        carried_N = torch.where(ended_TN[t], zero_N, excess_N)
        advantage_N = rho_N * (reward_TN[t] + gamma * (bootstrap_N + carried_N) - value_TN[t])
        now_N = rho_N * (reward_TN[t] + gamma * bootstrap_N - value_TN[t]) + gamma * c_N * carried_N
        valid_N = torch.ones_like(ended_TN[t]) if valid_TN is None else valid_TN[t]
        excess_N = torch.where(valid_N, now_N, excess_N)
        vs_TN[t] = torch.where(valid_N, value_TN[t] + now_N, value_TN[t])
        advantage_TN[t] = torch.where(valid_N, advantage_N, zero_N)
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
    return_B = torch.zeros(len(t_B), dtype=reward_TN.dtype)
    discount_B, last_B = torch.ones_like(return_B), t_B.clone()
    row_B, alive_B = t_B.clone(), torch.ones(len(t_B), dtype=torch.bool)
    for _ in range(num_steps):
        return_B = torch.where(alive_B, return_B + discount_B * reward_TN[row_B, env_B], return_B)
        last_B = torch.where(alive_B, row_B, last_B)
        terminated_B = terminated_TN[row_B, env_B]
        scaled_B = torch.where(terminated_B, torch.zeros_like(discount_B), discount_B * gamma)
        discount_B = torch.where(alive_B, scaled_B, discount_B)
        alive_B = alive_B & ~(terminated_B | ended_TN[row_B, env_B] | (row_B == newest))
        row_B = (row_B + 1) % len(reward_TN)
    return return_B, discount_B, last_B
