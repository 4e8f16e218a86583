"""Choices that do not start at 0: what the environment says is what a saved policy reads, wherever it acts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import gymnasium as gym
import httpx
import numpy as np
import pytest

import lockstep
from lockstep.core.spaces import DiscreteSpace, MultiDiscreteSpace, space_from_json, space_to_json
from lockstep.envs.control import EnvConfig
from lockstep.rl.control.ppo import PPOConfig
from lockstep.rl.session import RunConfig
from lockstep.server.app import build_app
from lockstep.server.config import ServeConfig
from lockstep.server.repository import Repository

HERE = "tests.e2e.test_offset_spaces"
SPACES = {
    "single": (gym.spaces.Discrete(3, start=5), gym.spaces.Discrete(3, start=-1)),
    "several": (gym.spaces.MultiDiscrete([3, 2], start=[5, -4]), gym.spaces.MultiDiscrete([3, 2], start=[-1, 8])),
}


class Echo(gym.Env):
    """One step an episode: right is the action that lies as far from its lowest as the observation from its own."""

    def __init__(self, kind: str) -> None:
        self.observation_space, self.action_space = SPACES[kind]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.obs = self.observation_space.sample()
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action), action
        wanted = self.obs - self.observation_space.start + self.action_space.start
        return self.obs, float(np.mean(wanted == action)), True, False, {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPACES)
def test_trained_saved_loaded_and_served_on_raw_observations(kind: str, tmp_path: Path) -> None:
    config = PPOConfig(
        env=EnvConfig(id=f"{HERE}:Echo", num_envs=8, kwargs={"kind": kind}),
        run=RunConfig(total_steps=6_000, final_episodes=20, tensorboard=False),
        learning_rate=3e-3,
        num_epochs=8,
    )
    run = lockstep.train(config, out=tmp_path)
    assert run.result.evaluation is not None
    assert run.result.evaluation.mean == 1.0
    assert lockstep.evaluate(run.path, episodes=20).mean == 1.0
    policy = lockstep.load(run.path)
    rows = [5, 6, 7] if kind == "single" else [[a, b] for a in (5, 6, 7) for b in (-4, -3)]
    wanted = [-1, 0, 1] if kind == "single" else [[a, b] for a in (-1, 0, 1) for b in (8, 9)]
    assert [np.asarray(policy.predict(np.array(row))).tolist() for row in rows] == wanted
    served = ServeConfig(reload_every_s=0.0)
    app = build_app(Repository({"echo": run.path}, served), served, key="")

    async def ask(body: dict) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.post("/v1/policies/echo/act", json=body)

    reply = asyncio.run(ask({"observations": rows}))
    assert reply.json()["action"] == wanted, reply.text
    below = 4 if kind == "single" else [4, -4]
    refused = asyncio.run(ask({"observation": below}))
    assert refused.status_code == 400
    assert "from [5" in refused.text


def test_spaces_saved_before_offsets_were_part_of_them_are_read() -> None:
    assert space_from_json({"kind": "multi_discrete", "nvec": [3, 2]}) == MultiDiscreteSpace((3, 2))
    for space in (MultiDiscreteSpace((3, 2), (1, 0)), DiscreteSpace(3, -2)):
        assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space
