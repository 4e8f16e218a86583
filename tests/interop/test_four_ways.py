"""Collection, evaluation, serving and export do the same with the same observations, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep import kernels
from lockstep.core.tree import tree_map
from lockstep.envs.control.stepper import EnvStep
from lockstep.interop import export_torch, load_exported
from lockstep.interop.check import random_observations
from lockstep.models.control.actor import Actor
from lockstep.models.control.folder import load_policy, save_policy
from lockstep.models.control.policy import Policy
from lockstep.rl.rollout import Collector, Rollout
from lockstep.server.runner import Ask, Runner
from lockstep.server.sessions import Session
from lockstep.server.tensors import interface_of

NUM_STEPS, NUM_ROWS, SEED = 6, 5, 11


class Script:
    """An environment that plays recorded observations; rows end and restart as recorded."""

    def __init__(self, observations: list[Any], starts_TN: np.ndarray) -> None:
        self.observations, self.starts_TN, self.t = observations, starts_TN, 0

    def reset(self, seed: int) -> Any:
        return self.observations[0]

    def step(self, action: np.ndarray) -> EnvStep:
        self.t += 1
        obs, starts = self.observations[self.t], self.starts_TN[self.t]
        no = np.zeros(NUM_ROWS, np.bool_)
        return EnvStep(obs, obs, np.zeros(NUM_ROWS, np.float32), starts, no, ~no, starts, [])


SLOW = ("stack", "lstm", "gru", "mlp-normalised", "image", "masked", "multi")
CASES = ["gaussian", *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]]


@pytest.mark.parametrize("policy", CASES, indirect=True)
def test_four_ways(policy: Policy, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    observations = [random_observations(policy, NUM_ROWS, rng) for _ in range(NUM_STEPS + 1)]
    starts_TN = rng.random((NUM_STEPS + 1, NUM_ROWS)) < 0.3
    starts_TN[0] = True

    collected = Rollout(NUM_STEPS, NUM_ROWS)
    collector = Collector(Script(observations, starts_TN), Actor(policy, NUM_ROWS, seed=SEED), keep_obs=False)
    collector.begin(0)
    collector.collect(collected)

    save_policy(policy, tmp_path / "folder")
    loaded = load_policy(tmp_path / "folder")
    evaluation = Actor(loaded, NUM_ROWS, seed=SEED)
    runner = Runner(loaded, interface_of(loaded), NUM_ROWS)
    drawn, best = Session("drawn", NUM_ROWS, SEED, 0), Session("best", NUM_ROWS, SEED, 0)
    export_torch(loaded, tmp_path / "p.pt2", distribution=True)
    exported = load_exported(tmp_path / "p.pt2")
    state = exported.initial_state(NUM_ROWS)

    for t in range(NUM_STEPS):
        obs, starts = observations[t], starts_TN[t]
        evaluated = evaluation.act(obs, deterministic=True)
        evaluation.advance(starts_TN[t + 1])
        (sampled,) = runner.run([Ask(obs, NUM_ROWS, False, SEED, 0, drawn, starts)])
        (served,) = runner.run([Ask(obs, NUM_ROWS, True, SEED, 0, best, starts)])
        inputs = {**(obs if isinstance(obs, dict) else {"observation": obs}), **state}
        out = exported({**inputs, "starts": starts} if state else inputs)
        state = exported.next_state(out)

        # The network's input, and the value, do not depend on the action that was taken: all four must agree.
        tree_map(lambda a, b, t=t: assert_equal(a[t], b), collected.features, evaluated.features)
        for value in (evaluated.value, sampled.value, served.value, out["value"]):
            assert_equal(collected.value[t], value)
        # The best action: evaluation, serving, export.
        assert_equal(evaluated.env_action, served.action)
        assert_equal(evaluated.env_action, out["action"])
        assert_equal(evaluated.logprob, served.logprob)
        assert_equal(evaluated.logprob, out["logprob"])
        # The sampled action: collection, serving, and the noise of that decision on the exported distribution.
        noise = policy.noise(SEED, torch.arange(NUM_ROWS), torch.full((NUM_ROWS,), t))
        action, logprob = sample(policy, {name: torch.from_numpy(x) for name, x in out.items()}, noise)
        assert collected.action is not None
        assert_equal(policy.action_map(collected.action[t]), sampled.action)
        assert_equal(collected.action[t], action)
        assert_equal(collected.logprob[t], sampled.logprob)
        assert_equal(collected.logprob[t], logprob)


def sample(policy: Policy, out: dict[str, torch.Tensor], noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if policy.spec.head == "gaussian":
        return kernels.gaussian_sample(out["mean"], out["log_std"][0], noise)
    return policy.head.sample(out["logits"], noise)


def assert_equal(one: Any, two: Any) -> None:
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
