"""Advantages and returns: recurrences over time, none of them differentiable.

`terminated` says that no reward can follow, so the bootstrap is dropped; `ended` says that the next row belongs to
another episode (terminated or truncated), so the trace is cut. Where an episode was truncated `next_value` must be the
value of the observation it was truncated at. `valid` marks rows that are steps; the dummy rows of an environment's
autoreset are not, get 0 and pass the trace on.

Legend: T time steps, N environments, B sampled transitions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.scan import cpu, naive

IMPLEMENTATIONS = {"naive": naive, "cpu": cpu}


@torch.no_grad()
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
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantage_TN.

    A_t = r_t + gamma (1 - terminated_t) V(next_t) - V_t + gamma lam (1 - ended_t) A_{t+1}
    """
    _check(reward_TN, value_TN, next_value_TN, flags=(terminated_TN, ended_TN, valid_TN))
    out: Tensor = IMPLEMENTATIONS[native.choose(reward_TN)].gae(
        reward_TN, value_TN, next_value_TN, terminated_TN, ended_TN, valid_TN, gamma, lam
    )
    return out


@torch.no_grad()
def discounted_return(reward_TN: Tensor, ended_TN: Tensor, start_N: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Forward-in-time discounted sums R_t = r_t + gamma R_{t-1}, restarted after each end (used to scale rewards).

    Args:
        start_N: R before the first step.

    Returns:
        (running_TN, end_N): R at each step, and R to start the next call with.
    """
    _check(reward_TN, flags=(ended_TN,))
    if start_N.shape != reward_TN.shape[1:] or start_N.dtype is not reward_TN.dtype:
        raise InputError(f"start is {tuple(start_N.shape)}; expected {tuple(reward_TN.shape[1:])}", field="start")
    out: tuple[Tensor, Tensor] = IMPLEMENTATIONS[native.choose(reward_TN)].discounted_return(
        reward_TN, ended_TN, start_N, gamma
    )
    return out


@torch.no_grad()
def vtrace(
    log_rhos_TN: Tensor,
    reward_TN: Tensor,
    value_TN: Tensor,
    next_value_TN: Tensor,
    terminated_TN: Tensor,
    ended_TN: Tensor,
    valid_TN: Tensor | None,
    gamma: float,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace targets (Espeholt et al. 2018, eq. 1) and policy-gradient advantages.

    Args:
        log_rhos_TN: log of target over behaviour probability of the taken actions.
        lam: scales the traces c.

    Returns:
        (vs_TN, advantage_TN) with advantage_t = min(rho_bar, rho_t) (r_t + gamma vs_{t+1} - V_t).
    """
    _check(log_rhos_TN, reward_TN, value_TN, next_value_TN, flags=(terminated_TN, ended_TN, valid_TN))
    out: tuple[Tensor, Tensor] = IMPLEMENTATIONS[native.choose(reward_TN)].vtrace(
        log_rhos_TN,
        reward_TN,
        value_TN,
        next_value_TN,
        terminated_TN,
        ended_TN,
        valid_TN,
        gamma,
        lam,
        rho_bar,
        c_bar,
    )
    return out


@torch.no_grad()
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
    """n-step returns of transitions (t, env) sampled from a ring buffer of T rows.

    A return sums up to `num_steps` rewards; it stops after a step that ended its episode or at row `newest`, the row
    written last. Rows wrap from T-1 to 0.

    Returns:
        (return_B; discount_B = gamma^k, 0 if the last step terminated; last_t_B int64, the row of the last step used:
        its next observation is the one to bootstrap from).
    """
    _check(reward_TN, flags=(terminated_TN, ended_TN))
    num_rows, num_envs = reward_TN.shape
    for name, index, bound in (("t", t_B, num_rows), ("env", env_B, num_envs)):
        if index.dtype is not torch.int64 or index.shape != t_B.shape or index.dim() != 1:
            raise InputError(f"{name} is {index.dtype} {tuple(index.shape)}; expected int64 [B]", field=name)
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < bound):
            raise InputError(f"{name} must lie in 0..{bound - 1}; got {index.tolist()}", field=name)
    if num_steps < 1:
        raise InputError(f"num_steps must be at least 1; got {num_steps}", field="num_steps")
    out: tuple[Tensor, Tensor, Tensor] = IMPLEMENTATIONS[native.choose(reward_TN)].nstep_returns(
        reward_TN, terminated_TN, ended_TN, t_B, env_B, newest, num_steps, gamma
    )
    return out


def _check(first: Tensor, *rest: Tensor, flags: tuple[Tensor | None, ...]) -> None:
    for tensor in (first, *rest):
        if tensor.dim() != 2 or tensor.shape != first.shape or tensor.dtype is not first.dtype:
            raise InputError(
                f"inputs are [T, N] of one dtype; got {[(tuple(t.shape), t.dtype) for t in (first, *rest)]}",
                field="reward",
            )
    for flag in flags:
        if flag is not None and (flag.dtype is not torch.bool or flag.shape != first.shape):
            raise InputError(
                f"flags are bool {tuple(first.shape)}; got {flag.dtype} {tuple(flag.shape)}", field="ended"
            )
