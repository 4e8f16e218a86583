"""Native vector environments behave as the single ones do, bit for bit."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from lockstep.core.spaces import BoxSpace
from lockstep.envs.control import AtariConfig, EnvConfig, episode_seed, make_env
from lockstep.envs.control.mujoco_sim import TASKS


def assert_same_run(one_config: EnvConfig, two_config: EnvConfig, num_steps: int) -> int:
    """Both give the same arrays under the same actions; returns how many episodes ended."""
    one, two = make_env(one_config, seed=3), make_env(two_config, seed=3)
    try:
        np.testing.assert_array_equal(one.obs, two.obs)
        rng, num_ended = np.random.default_rng(0), 0
        for k in range(num_steps):
            actions = random_actions(one, rng)
            a, b = one.step(actions), two.step(actions)
            np.testing.assert_array_equal(a.obs, b.obs, err_msg=f"obs at step {k}")
            np.testing.assert_array_equal(a.next_obs, b.next_obs, err_msg=f"next_obs at step {k}")
            np.testing.assert_array_equal(a.reward_N, b.reward_N, err_msg=f"reward at step {k}")
            np.testing.assert_array_equal(a.terminated_N, b.terminated_N)
            np.testing.assert_array_equal(a.truncated_N, b.truncated_N)
            np.testing.assert_array_equal(a.valid_N, b.valid_N)
            assert a.episodes == b.episodes
            num_ended += len(a.episodes)
        return num_ended
    finally:
        one.close()
        two.close()


def random_actions(stepper, rng: np.random.Generator) -> np.ndarray:
    space = stepper.action_space
    if isinstance(space, BoxSpace):
        low, high = space.bounds()
        return rng.uniform(low, high, (stepper.num_envs, *space.shape)).astype(np.float32)
    return rng.integers(0, space.n, stepper.num_envs)


@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
@pytest.mark.parametrize("num_envs", [1, 7])
def test_native_cartpole_equals_single_cartpoles(num_envs: int, autoreset) -> None:
    sync, native = (
        EnvConfig(num_envs=num_envs, vectoriser=vectoriser, autoreset=autoreset, time_limit=30)
        for vectoriser in ("sync", "native")
    )
    assert assert_same_run(sync, native, 300) > 10


def test_native_cartpole_truncates_at_the_registered_limit() -> None:
    stepper = make_env(EnvConfig(num_envs=4, vectoriser="native"), seed=0)
    assert stepper.env._limit == 500


@pytest.mark.parametrize("env_id", ["Ant-v5", "HalfCheetah-v5", "InvertedPendulum-v5"])
def test_native_mujoco_equals_gymnasium(env_id: str) -> None:
    pytest.importorskip("mujoco", reason="extra: mujoco")
    sync, native = (
        EnvConfig(id=env_id, num_envs=2, vectoriser=vectoriser, time_limit=60, num_threads=2)
        for vectoriser in ("sync", "native")
    )
    assert assert_same_run(sync, native, 130) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("env_id", sorted(TASKS))
def test_native_mujoco_equals_gymnasium_for_long(env_id: str) -> None:
    pytest.importorskip("mujoco", reason="extra: mujoco")
    sync, native = (
        EnvConfig(id=env_id, num_envs=3, vectoriser=vectoriser, time_limit=100) for vectoriser in ("sync", "native")
    )
    assert assert_same_run(sync, native, 500) >= 10


def test_native_halfcheetah_equals_plain_gymnasium_without_any_wrapper_of_ours() -> None:
    pytest.importorskip("mujoco", reason="extra: mujoco")
    stepper = make_env(EnvConfig(id="HalfCheetah-v5", num_envs=2), seed=5)
    plain = gym.make("HalfCheetah-v5")
    obs, _ = plain.reset(seed=episode_seed(5, 1, 0))
    rng = np.random.default_rng(1)
    for _ in range(50):
        actions = random_actions(stepper, rng)
        step = stepper.step(actions)
        obs, reward, _, _, _ = plain.step(actions[1])
        np.testing.assert_array_equal(step.obs[1], obs.astype(np.float32))
        assert step.reward_N[1] == np.float32(reward)
    plain.close()
    stepper.close()


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        (EnvConfig(num_envs=5, vectoriser="native", time_limit=25), "gymnasium"),
        (EnvConfig(num_envs=2, vectoriser="sync", time_limit=25), "gymnasium"),
        (EnvConfig(id="Ant-v5", num_envs=2, time_limit=15), "mujoco"),
        (EnvConfig(id="InvertedDoublePendulum-v5", num_envs=2), "mujoco"),
        (EnvConfig(id="LunarLander-v3", num_envs=2, time_limit=40), "Box2D"),
        pytest.param(EnvConfig(id="MinAtar/Breakout-v1", num_envs=2), "minatar", marks=pytest.mark.slow),
        (EnvConfig(id="MiniGrid-Empty-5x5-v0", num_envs=2, time_limit=20), "minigrid"),
        (EnvConfig(id="Taxi-v4", num_envs=2, time_limit=20), "gymnasium"),
    ],
    ids=lambda value: value.id if isinstance(value, EnvConfig) else value,
)
def test_restoring_is_exact(config: EnvConfig, extra: str) -> None:
    pytest.importorskip(extra, reason=f"package {extra}")
    one, two = make_env(config, seed=1), make_env(config, seed=2)
    try:
        rng = np.random.default_rng(0)
        for _ in range(53):
            one.step(random_actions(one, rng))
        assert two.load_state_dict(one.state_dict())
        for _ in range(60):
            actions = random_actions(one, rng)
            a, b = one.step(actions), two.step(actions)
            np.testing.assert_array_equal(a.reward_N, b.reward_N)
            np.testing.assert_array_equal(a.starts_N, b.starts_N)
            for key in a.obs if isinstance(a.obs, dict) else [None]:
                np.testing.assert_array_equal(*(x.obs if key is None else x.obs[key] for x in (a, b)))
            assert a.episodes == b.episodes
    finally:
        one.close()
        two.close()


@pytest.mark.slow
def test_atari_episodes_depend_on_seed_and_actions_only_and_restore() -> None:
    pytest.importorskip("ale_py", reason="extra: atari")
    configs = [EnvConfig(id="ALE/Pong-v5", num_envs=2, time_limit=12, num_threads=threads) for threads in (1, 2)]
    one, two = (make_env(config, seed=3) for config in configs)
    rng = np.random.default_rng(0)
    assert one.obs_space == BoxSpace((1, 84, 84), "uint8", (0.0,), (255.0,))
    num_ended = 0
    for _ in range(30):
        actions = rng.integers(0, 6, 2)
        a, b = one.step(actions), two.step(actions)
        np.testing.assert_array_equal(a.next_obs, b.next_obs)
        np.testing.assert_array_equal(a.obs, b.obs)
        num_ended += len(a.episodes)
    assert num_ended == 4
    other = make_env(configs[0], seed=8)
    assert other.load_state_dict(one.state_dict())
    actions = rng.integers(0, 6, 2)
    np.testing.assert_array_equal(one.step(actions).obs, other.step(actions).obs)
    for stepper in (one, two, other):
        stepper.close()


def test_a_lost_life_ends_the_episode_but_not_the_game() -> None:
    pytest.importorskip("ale_py", reason="extra: atari")
    atari = AtariConfig(episodic_life=True, noop_max=0, sticky=0.0)
    stepper = make_env(EnvConfig(id="ALE/Breakout-v5", num_envs=1, atari=atari, num_threads=1), seed=0)
    ends = []
    for k in range(140):
        step = stepper.step(np.array([1 if k % 10 == 0 else 0]))
        if step.episodes:
            assert step.terminated_N[0]
            np.testing.assert_array_equal(step.obs, step.next_obs)
            ends.append(k)
    assert len(ends) >= 3
    assert stepper.env._episode_N[0] == 0
    stepper.close()
