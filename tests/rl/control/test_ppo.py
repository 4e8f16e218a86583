"""PPO as a user meets it: it learns, repeats itself, and resumes to the very same curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lockstep.core.errors import ConfigError
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig
from lockstep.rl.control import a2c, ppo
from lockstep.rl.rollout import Collector, Rollout
from lockstep.rl.session import RunConfig, Session
from lockstep.runs.directory import RunDirectory
from lockstep.runs.jsonl import read_jsonl

SMALL = ppo.PPOConfig(
    env=EnvConfig(id="CartPole-v1", num_envs=4),
    run=RunConfig(total_steps=1024, log_every=128, checkpoint_every=256, final_episodes=4, tensorboard=False),
    num_steps=32,
    num_epochs=2,
    minibatch_size=64,
    normalise_obs=True,
    normalise_reward=True,
)
LSTM = replace(SMALL, network=NetworkConfig(recurrent="lstm", recurrent_size=16), minibatch_size=64)
PENDULUM = replace(SMALL, env=EnvConfig(id="Pendulum-v1", num_envs=4))


def metrics_of(path: Path) -> list[dict[str, float]]:
    """Metric lines without the columns that measure time."""
    times = {"wall_s", "steps_per_s", "train_s"}
    return [{k: v for k, v in line.items() if k not in times} for line in read_jsonl(path / "metrics.jsonl")]


def run_in(root: Path, config: ppo.PPOConfig) -> tuple[list[dict[str, float]], str]:
    with (
        RunDirectory.create(root, "t", config, config.run.seed) as directory,
        Session(config.run, config.env, directory=directory) as session,
    ):
        result = ppo.train(config, session)
    assert result.policy is not None
    return metrics_of(directory.path), result.policy.digest()


def test_same_seed_same_curve(tmp_path: Path) -> None:
    """As of the other networks the resumed ones show, below."""
    one, two = run_in(tmp_path, SMALL), run_in(tmp_path, SMALL)
    assert one == two
    other = run_in(tmp_path, replace(SMALL, run=replace(SMALL.run, seed=2)))
    assert other[1] != one[1]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("config", "stop_at"),
    [
        pytest.param(SMALL, 300, marks=pytest.mark.slow),
        (SMALL, 700),
        *(pytest.param(LSTM, stop, marks=pytest.mark.slow) for stop in (300, 700)),
        (PENDULUM, 700),
    ],
    ids=["mlp-300", "mlp-700", "lstm-300", "lstm-700", "continuous-700"],
)
def test_resumed_curve_is_the_uninterrupted_one(config: ppo.PPOConfig, stop_at: int, tmp_path: Path) -> None:
    expected = run_in(tmp_path / "whole", config)
    directory = RunDirectory.create(tmp_path / "cut", "t", config, 1)

    def stop(step: int, total: int, metrics: object) -> None:
        if step >= stop_at:
            raise Killed

    session = Session(config.run, config.env, directory=directory, on_progress=stop)
    with pytest.raises(Killed), directory, session:
        ppo.train(config, session)
    with RunDirectory.open(directory.path) as again:
        result = ppo.train(config, Session(config.run, config.env, directory=again, resume=True))
    assert result.policy is not None
    assert metrics_of(directory.path) == expected[0]
    assert result.policy.digest() == expected[1]


def test_first_pass_ratio_is_exactly_one() -> None:
    """On the first pass over a rollout the learner's log-probability is the sampler's, bit for bit."""
    for config in (SMALL, PENDULUM):
        env = make_env(config.env, seed=1)
        policy = Policy(config.policy_spec(env.obs_space, env.action_space), seed=1)
        collector = Collector(env, Actor(policy, 4, seed=1), keep_obs=False)
        collector.begin(1)
        rollout = Rollout(50, 4)
        collector.collect(rollout)
        assert rollout.action is not None
        logprob, _, value = policy.evaluate(rollout.features.flatten(0, 1), rollout.action.flatten(0, 1))
        assert torch.equal(logprob, rollout.logprob.flatten())
        assert torch.equal(value, rollout.value.flatten())
        env.close()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_bootstraps(env_id: str) -> None:
    """next_value is V(obs t+1) inside an episode, V(final observation) at a truncation."""
    env = make_env(EnvConfig(id=env_id, num_envs=2, time_limit=15), seed=1)
    config = replace(SMALL, normalise_obs=False)
    policy = Policy(config.policy_spec(env.obs_space, env.action_space), seed=1)
    actor = Actor(policy, 2, seed=1)
    finals = {}
    original = env.step

    def spy(action):  # type: ignore[no-untyped-def]
        result = original(action)
        finals[len(finals)] = result
        return result

    env.step = spy  # type: ignore[method-assign]
    collector = Collector(env, actor, keep_obs=False)
    collector.begin(1)
    rollout = Rollout(40, 2)
    collector.collect(rollout)
    truncations = 0
    for t in range(40):
        value = policy.critic(torch.from_numpy(finals[t].next_obs)).squeeze(-1)  # type: ignore[misc]
        for i in range(2):
            if rollout.terminated[t, i] or not rollout.valid[t, i]:
                continue
            truncations += int(rollout.ended[t, i])
            assert torch.equal(rollout.next_value[t, i], value[i])
    assert truncations >= (2 if env_id == "Pendulum-v1" else 1)


def test_a2c_repeats_itself() -> None:
    config = a2c.A2CConfig(
        env=EnvConfig(num_envs=4), run=RunConfig(total_steps=400, final_episodes=0), normalise_reward=True
    )
    digests = []
    for vtrace in (False, False, True):
        chosen = replace(config, vtrace=vtrace)
        result = a2c.train(chosen, Session(chosen.run, chosen.env))
        assert result.policy is not None
        digests.append(result.policy.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("change", [{"num_steps": 0}, {"gamma": 1.5}, {"minibatch_size": 0}])
def test_impossible_configs_are_refused(change: dict[str, float]) -> None:
    config = replace(SMALL, **change)
    with pytest.raises(ConfigError, match=next(iter(change))):
        ppo.train(config, Session(config.run, config.env))


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", ["none", "lstm", "gru"])
def test_ppo_learns_cartpole(recurrent: str) -> None:
    config = ppo.PPOConfig(
        network=NetworkConfig(recurrent=recurrent),  # type: ignore[arg-type]
        run=RunConfig(total_steps=100_000, eval_every=4096, stop_at_return=475.0, final_episodes=50),
        num_steps=32 if recurrent == "none" else 128,
        minibatch_size=256,
        num_epochs=20 if recurrent == "none" else 10,
        gamma=0.98,
        gae_lambda=0.8 if recurrent == "none" else 0.95,
        learning_rate=1e-3,
    )
    result = ppo.train(config, Session(config.run, config.env))
    assert result.evaluation is not None
    assert result.evaluation.mean >= 450
