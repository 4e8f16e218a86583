"""What the learners' buffers hold is the same whichever way an environment is stepped, bootstraps included.

The forms are those of `test_conformance`, the step-counting environment in every autoreset mode, and EnvPool's Catch,
which counts its steps too: the ball falls one row a step.
"""

# N environments, T rows

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch

from lockstep.envs.control import Stepper
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.exploration import PolicySamples
from lockstep.rl.offpolicy import TransitionCollector
from lockstep.rl.replay import ReplayBuffer
from lockstep.rl.rollout import Collector, Rollout
from tests.envs.control.test_conformance import FORMS, NUM_ENVS, SEED, build

NUM_STEPS, NUM_KEPT, GAMMA = 64, 30, 0.5
AUTORESETS = ("next_step", "same_step", "disabled")


class Kept(NamedTuple):
    """A transition as a learner reads it; `bootstrap` is V(next observation), or 0 after a termination."""

    obs: tuple[float, ...]
    action: int
    reward: float
    value: float
    bootstrap: float
    terminated: bool
    ended: bool


def policy_for(env: Stepper) -> Policy:
    network = NetworkConfig(hidden_sizes=(8,))
    spec = PolicySpec(obs_space=env.obs_space, action_space=env.action_space, head="categorical", network=network)
    return Policy(spec, seed=3)


def rollout_of(env: Stepper) -> list[list[Kept]]:
    """First transitions of each environment in the buffer of PPO and A2C."""
    policy = policy_for(env)
    collector = Collector(env, Actor(policy, env.num_envs, seed=5), keep_obs=False)
    collector.begin(SEED)
    rollout = Rollout(NUM_STEPS, env.num_envs)
    collector.collect(rollout)
    assert rollout.action is not None
    out: list[list[Kept]] = []
    for i in range(env.num_envs):
        rows = rollout.valid[:, i].nonzero().flatten().tolist()
        out.append(
            [
                Kept(
                    tuple(rollout.features[t, i].flatten().tolist()),
                    int(rollout.action[t, i]),
                    float(rollout.reward[t, i]),
                    float(rollout.value[t, i]),
                    0.0 if rollout.terminated[t, i] else float(rollout.next_value[t, i]),
                    bool(rollout.terminated[t, i]),
                    bool(rollout.ended[t, i]),
                )
                for t in rows[:NUM_KEPT]
            ]
        )
    return out


def replay_of(env: Stepper) -> list[list[Kept]]:
    """The same from the buffer of the replay algorithms, where a bootstrap is discount * V(next observation)."""
    policy = policy_for(env)
    replay = ReplayBuffer(NUM_STEPS * env.num_envs, env.num_envs, seed=0, gamma=GAMMA)
    collector = TransitionCollector(env, Actor(policy, env.num_envs, seed=5), replay, PolicySamples())
    collector.begin(SEED)
    collector.collect(NUM_STEPS)
    out: list[list[Kept]] = []
    for i in range(env.num_envs):
        index = torch.tensor([t * env.num_envs + i for t in range(NUM_STEPS) if replay.valid[t, i]][:NUM_KEPT])
        batch = replay.gather(index)
        values, next_values = (
            policy(features, {}, torch.zeros(0))[1] for features in (batch.features, batch.next_features)
        )
        terminated = replay.terminated.flatten()[index]
        assert torch.equal(batch.discount_B, GAMMA * (~terminated))
        bootstrap = torch.where(terminated, torch.zeros(()), next_values)
        columns = (batch.action, batch.reward_B, values, bootstrap, terminated, replay.ended.flatten()[index])
        rows = zip(batch.features.flatten(1).tolist(), *(column.tolist() for column in columns), strict=True)
        out.append([Kept(tuple(obs), *rest) for obs, *rest in rows])
    return out


@pytest.fixture(scope="module")
def reference() -> list[list[Kept]]:
    """The plain loop over environments without autoreset, whose transitions `test_conformance` holds to its formula."""
    env = build("sync", "disabled")
    try:
        return rollout_of(env)
    finally:
        env.close()


@pytest.mark.parametrize("autoreset", AUTORESETS)
@pytest.mark.parametrize("form", FORMS)
def test_buffers_hold_the_same_transitions_and_bootstraps(
    form: str, autoreset: str, reference: list[list[Kept]]
) -> None:
    env = build(form, autoreset)
    try:
        assert rollout_of(env) == reference
        assert replay_of(env) == reference
    finally:
        env.close()


def test_the_reference_is_worth_comparing_with(reference: list[list[Kept]]) -> None:
    """Both kinds of ending occur, and V of a final observation is not V of the reset that follows it."""
    assert [len(rows) for rows in reference] == [NUM_KEPT] * NUM_ENVS
    pairs = [pair for rows in reference for pair in itertools.pairwise(rows)]
    cut = [(row.bootstrap, following.value) for row, following in pairs if row.ended and not row.terminated]
    assert len(cut) > 5
    assert sum(row.terminated for row, _ in pairs) > 5
    assert all(bootstrap != value for bootstrap, value in cut)
