"""PPO by the compiled call and by autograd is the same PPO, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

from lockstep import kernels
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, Space
from lockstep.envs.control.config import EnvConfig
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl import gradients
from lockstep.rl.control import ppo
from lockstep.rl.session import RunConfig, Session


class Knobs(gymnasium.Env):
    """Two knobs of 3 and 2 positions; reward for those that the observation names."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (5,), np.float32)
    action_space = gymnasium.spaces.MultiDiscrete([3, 2])

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.step_count = 0
        return self._obs(), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        wanted = np.array([int(self.last[0] > 0) + int(self.last[0] > 0.5), int(self.last[1] > 0)])
        self.step_count += 1
        return self._obs(), float((action == wanted).sum()), self.step_count == 9, False, {}

    def _obs(self):  # type: ignore[no-untyped-def]
        self.last = self.np_random.uniform(-1.0, 1.0, 5).astype(np.float32)
        return self.last


gymnasium.register("LockstepKnobs-v0", Knobs)

BASE = ppo.PPOConfig(
    env=EnvConfig(id="CartPole-v1", num_envs=4),
    run=RunConfig(total_steps=3 * 128, log_every=128, final_episodes=0, tensorboard=False),
    num_steps=32,
    num_epochs=3,
    minibatch_size=50,
    entropy_coef=0.01,
)
CONFIGS = {
    "discrete": BASE,
    "multi-discrete": replace(BASE, env=EnvConfig(id="LockstepKnobs-v0", num_envs=4, vectoriser="sync")),
    "continuous": replace(BASE, env=EnvConfig(id="Pendulum-v1", num_envs=4), normalise_obs=True, value_clip=0.2),
    "bf16": replace(BASE, network=NetworkConfig(compute_dtype="bf16", activation="relu"), normalise_advantage=False),
    "stopped-by-kl": replace(BASE, target_kl=0.003, learning_rate=3e-3),
}


class Recorder:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def __call__(self, step: int, total: int, metrics) -> None:  # type: ignore[no-untyped-def]
        self.lines.append({k: v for k, v in metrics.items() if k != "steps_per_s"})


def learn(config: ppo.PPOConfig) -> tuple[str, list[dict[str, float]]]:
    recorder = Recorder()
    result = ppo.train(config, Session(config.run, config.env, on_progress=recorder))
    assert result.policy is not None
    return result.policy.digest(), recorder.lines


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_and_composed_learn_the_same_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    calls = []
    original = kernels.ActorCriticGradients.__call__

    def spy(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kernels.ActorCriticGradients, "__call__", spy)
    fused = learn(config)
    assert calls
    monkeypatch.setattr(gradients, "_fused", lambda policy: None)
    num = len(calls)
    composed = learn(config)
    assert len(calls) == num
    assert fused[1] == composed[1]
    assert len(fused[1]) == 3
    assert fused[0] == composed[0]


SETTINGS = {"clip": 0.2, "value_clip": None, "value_coef": 0.5, "entropy_coef": 0.0, "normalise_advantage": True}
VECTOR = BoxSpace((5,), "float32")
MASKED = DictSpace({"obs": VECTOR, "action_mask": BoxSpace((3,), "bool", (0.0,), (1.0,))})


def make_policy(space: Space, network: NetworkConfig) -> Policy:
    spec = PolicySpec(obs_space=space, action_space=DiscreteSpace(3), head="categorical", network=network)
    return Policy(spec)


def columns(*shape: int) -> dict[str, torch.Tensor]:
    floats = {name: torch.randn(shape) for name in ("logprob", "advantage", "value")}
    return {"action": torch.randint(0, 3, shape), **floats}


def test_masked_policy_takes_autograd() -> None:
    policy = make_policy(MASKED, NetworkConfig())
    features = {"vector": torch.randn(6, 5), "action_mask": torch.ones(6, 3, dtype=torch.bool)}
    batch = gradients.RowBatch(kernels.RolloutRows(features, **columns(6)), torch.arange(6))
    check_gradients(policy, batch)


def test_recurrent_policy_takes_autograd() -> None:
    policy = make_policy(VECTOR, NetworkConfig(recurrent="gru", recurrent_size=8))
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    starts = torch.zeros(3, 2, dtype=torch.bool)
    batch = gradients.SequenceBatch(
        features=torch.randn(3, 2, 5), **columns(3, 2), mask=mask, state=policy.initial_state(2), starts=starts
    )
    check_gradients(policy, batch)


def check_gradients(policy: Policy, batch: gradients.RowBatch | gradients.SequenceBatch) -> None:
    metrics = gradients.PPOGradients(policy)(batch, **SETTINGS)  # type: ignore[arg-type]
    assert set(metrics) == set(kernels.PPO_STATS)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in policy.parameters())
