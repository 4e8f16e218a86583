"""Inputs that a policy met while it played, by the names that exported programs give them.

Legend: N rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core.tree import tree_map
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.interop.exported import Arrays
from lockstep.interop.program import OBSERVATION, STARTS, STATE, inputs_of
from lockstep.models.control.actor import Actor, as_tensor
from lockstep.models.control.policy import Policy

NUM_ENVS = 8
RECORD_SEED_OFFSET = 2_000_003
"""Apart from the seeds of training and of evaluation, so that what is compared on these rows was not learned on them."""


def recorded_inputs(policy: Policy, env: EnvConfig, num: int, *, seed: int) -> Arrays:
    """`num` rows of the inputs of `PolicyProgram`, from episodes with sampled actions."""
    seed += RECORD_SEED_OFFSET
    stepper = make_env(replace(env, num_envs=NUM_ENVS, clip_reward=False), seed=seed)
    ports = inputs_of(policy)
    rows: dict[str, list[np.ndarray]] = {port.name: [] for port in ports}
    try:
        actor = Actor(policy, NUM_ENVS, seed=seed)
        obs = stepper.reset(seed)
        for _ in range(-(-num // NUM_ENVS)):
            found: dict[str, Any] = {**obs} if isinstance(obs, dict) else {OBSERVATION: obs}
            found |= {STARTS: actor.starts.numpy()} | {STATE + name: x.numpy() for name, x in actor.state.items()}
            for port in ports:
                rows[port.name].append(np.array(found[port.name], dtype=port.dtype))
            result = stepper.step(actor.act(obs).env_action.numpy())
            actor.advance(result.starts_N, result.valid_N)
            obs = result.obs
    finally:
        stepper.close()
    return {name: np.concatenate(parts)[:num] for name, parts in rows.items()}


def split_inputs(policy: Policy, inputs: Arrays) -> tuple[Any, dict[str, Tensor], Tensor]:
    """(observation, state, starts) of such rows, as `Policy.act` takes them."""
    num = len(next(iter(inputs.values())))
    state = {name: as_tensor(inputs[STATE + name]) for name in policy.initial_state(1)}
    starts = as_tensor(inputs[STARTS]) if state else torch.zeros(num, dtype=torch.bool)
    names = [port.name for port in inputs_of(policy) if port.name != STARTS and not port.name.startswith(STATE)]
    obs: Any = inputs[OBSERVATION] if names == [OBSERVATION] else {name: inputs[name] for name in names}
    return tree_map(as_tensor, obs), state, starts
