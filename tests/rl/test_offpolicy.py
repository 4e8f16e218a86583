"""The collector stores what happened: transitions follow each other, ends keep their true successor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import PolicySpec
from lockstep.rl.exploration import PolicySamples, UniformUntil
from lockstep.rl.offpolicy import ReplayConfig, TransitionCollector, make_replay


def make(autoreset: Any, env_id: str = "CartPole-v1", **spec: Any) -> TransitionCollector:
    env = make_env(EnvConfig(id=env_id, num_envs=3, time_limit=12, autoreset=autoreset, vectoriser="sync"), seed=0)
    kind = {"obs_space": env.obs_space, "action_space": env.action_space, "head": "categorical", "critic": False}
    policy = Policy(PolicySpec(**kind, **spec), seed=0)
    replay = make_replay(ReplayConfig(buffer_size=600), policy, 3, gamma=0.9, seed=0)
    exploration = UniformUntil(env.action_space, 30, PolicySamples(), seed=0)
    collector = TransitionCollector(env, Actor(policy, 3, seed=0), replay, exploration)
    collector.begin(0)
    return collector


def valid_rows(collector: TransitionCollector, env: int) -> dict[str, np.ndarray]:
    replay = collector.replay
    rows = slice(replay.num_written)
    keep = replay.valid[rows, env].numpy()
    names = ("features", "next_features", "action", "terminated", "ended", "reward")
    return {name: replay.__dict__[name][rows, env].numpy()[keep] for name in names}


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_autoreset_modes_store_the_same_transitions(frame_stack: int) -> None:
    one, two = make("same_step", frame_stack=frame_stack), make("next_step", frame_stack=frame_stack)
    for collector in (one, two):
        collector.exploration.num_random = 10**9
        collector.collect(90)
    for env in range(3):
        first, second = valid_rows(one, env), valid_rows(two, env)
        num = min(len(first["action"]), len(second["action"]))
        assert num > 60
        for name in first:
            assert np.array_equal(first[name][:num], second[name][:num]), name
        assert first["ended"].any()
        assert (first["ended"] & ~first["terminated"]).any()


@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
@pytest.mark.parametrize("frame_stack", [1, 3])
def test_successors_follow_and_ended_episodes_keep_their_own(autoreset: str, frame_stack: int) -> None:
    collector = make(autoreset, frame_stack=frame_stack)
    num, episodes = collector.collect(60)
    total = 0
    for env in range(3):
        rows = valid_rows(collector, env)
        total += len(rows["action"])
        inside = np.flatnonzero(~rows["ended"][:-1])
        assert np.array_equal(rows["next_features"][inside], rows["features"][inside + 1])
        ended = np.flatnonzero(rows["ended"][:-1])
        assert len(ended) > 0
        assert (rows["next_features"][ended] != rows["features"][ended + 1]).any(axis=1).all()
        first_frames = rows["features"][ended + 1].reshape(len(ended), frame_stack, 4)
        assert (first_frames == first_frames[:, :1]).all()
    assert num == total == collector.num_steps
    assert len(episodes) == sum(int(valid_rows(collector, env)["ended"].sum()) for env in range(3))


def test_with_a_normaliser_raw_observations_are_stored_and_encoded_when_sampled() -> None:
    collector = make("same_step", normalise_obs=True)
    collector.collect(40)
    replay, policy = collector.replay, collector.actor.policy
    batch = replay.sample(16, 0)
    raw = replay.features.flatten(0, 1)[batch.index_B]
    assert not torch.allclose(raw, batch.features)
    assert torch.equal(policy.preprocess.normaliser(raw), batch.features)
    assert float(policy.preprocess.normaliser.count) == 120
    before = batch.features
    policy.preprocess.update(torch.full((50, 4), 3.0))
    assert not torch.equal(replay.sample(16, 0).features, before)


@pytest.mark.parametrize(("env_id", "num_inexact"), [("CartPole-v1", 0), ("tests.envs.control.test_stepper:Noisy", 3)])
def test_an_inexact_resume_is_warned_of(env_id: str, num_inexact: int, caplog: pytest.LogCaptureFixture) -> None:
    saved, resumed = make("same_step", env_id), make("same_step", env_id)
    saved.collect(5)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.exact == (num_inexact == 0)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == (num_inexact > 0)
    assert all(f"{num_inexact} of 3 environments could not be restored" in text for text in said)
