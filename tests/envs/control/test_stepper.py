"""Spaces, masks, errors and settings of `make_env`."""

from __future__ import annotations

import os
import signal
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from lockstep.core.errors import ConfigError, DeadlineError, EnvError, InputError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace
from lockstep.envs.control import EnvConfig, make_env, rendering
from lockstep.envs.control.single import find_target
from lockstep.envs.control.spaces import ObsCodec, action_space_of, leaf_space

HERE = "tests.envs.control.test_stepper"


class Strange(gym.Env):
    """Nested observations, an offset discrete action space, and trouble on request."""

    def __init__(self, trouble: str = "", trouble_at: int = 3) -> None:
        if trouble == "make":
            raise RuntimeError("no display")
        self.observation_space = gym.spaces.Dict(
            {
                "outer": gym.spaces.Dict({"inner": gym.spaces.Box(-1, 1, (2, 2), np.float64)}),
                "pair": gym.spaces.Tuple((gym.spaces.Discrete(4, start=2), gym.spaces.MultiBinary(3))),
                "words": gym.spaces.Text(5),
            }
        )
        self.action_space = gym.spaces.Discrete(3, start=5)
        self.trouble, self.trouble_at, self.count, self.actions = trouble, trouble_at, 0, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.obs(), {}

    def step(self, action):
        assert action in self.action_space, action
        self.count += 1
        if self.count == self.trouble_at:
            if self.trouble == "crash":
                raise ZeroDivisionError("inside the environment")
            if self.trouble == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "hang":
                signal.pause()
        is_bad = self.count == self.trouble_at and self.trouble == "reward"
        return self.obs(), np.inf if is_bad else float(action), False, False, {}

    def obs(self):
        inner = np.full((2, 2), self.count / 10)
        if self.trouble == "obs" and self.count == self.trouble_at:
            inner[0, 1] = np.nan
        return {"outer": {"inner": inner}, "pair": (2 + self.count % 4, np.array([1, 0, 1], np.int8)), "words": "hi"}


class Masked(gym.Env):
    """Allows only action `count % 3`; says so by a method."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = gym.spaces.Box(0, 9, (1,), np.float32), gym.spaces.Discrete(3)
        self.count = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        return np.full(1, self.count, np.float32), 1.0, self.count == 4, False, {}

    def action_masks(self):
        return np.arange(3) == self.count % 3


def test_nested_observations_become_flat_and_choices_stay_the_environments_own() -> None:
    stepper = make_env(EnvConfig(id=f"{HERE}:Strange", num_envs=2, vectoriser="sync"), seed=0)
    assert stepper.obs_space == DictSpace(
        {
            "outer.inner": BoxSpace((2, 2), "float32", (-1.0,), (1.0,)),
            "pair.0": DiscreteSpace(4, 2),
            "pair.1": BoxSpace((3,), "uint8", (0.0,), (1.0,)),
        }
    )
    assert stepper.action_space == DiscreteSpace(3, 5)
    assert stepper.describe()["dropped"] == ["words"]
    step = stepper.step(np.array([5, 7]))
    np.testing.assert_array_equal(step.reward_N, [5.0, 7.0])
    np.testing.assert_array_equal(step.obs["pair.0"], [3, 3])
    np.testing.assert_array_equal(step.obs["outer.inner"], np.full((2, 2, 2), 0.1, np.float32))
    assert {leaf.dtype.name for leaf in step.obs.values()} == {"float32", "int64", "uint8"}


@pytest.mark.parametrize("vectoriser", ["sync", "async"])
@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
def test_masks_from_a_method_follow_the_observation(vectoriser: Any, autoreset: Any) -> None:
    config = EnvConfig(id=f"{HERE}:Masked", num_envs=2, vectoriser=vectoriser, autoreset=autoreset, num_workers=2)
    stepper = make_env(config, seed=0)
    try:
        assert stepper.obs_space == DictSpace(
            {
                "action_mask": BoxSpace((3,), "bool", (0.0,), (1.0,)),
                "obs": BoxSpace((1,), "float32", (0.0,), (9.0,)),
            }
        )
        for _ in range(11):
            step = stepper.step(np.zeros(2, np.int64))
            for obs in (step.obs, step.next_obs):
                assert obs["action_mask"].dtype == np.bool_
                np.testing.assert_array_equal(obs["action_mask"].argmax(1), obs["obs"][:, 0] % 3)
            assert (step.next_obs["obs"][step.terminated_N] == 4).all()
    finally:
        stepper.close()


def test_masks_from_info() -> None:
    stepper = make_env(EnvConfig(id="Taxi-v4", num_envs=2), seed=0)
    mask = stepper.step(np.zeros(2, np.int64)).obs["action_mask"]
    assert mask.shape == (2, 6)
    assert mask.any(axis=1).all()
    assert not mask.all()


def test_discrete_and_multidiscrete_spaces() -> None:
    assert leaf_space(gym.spaces.Discrete(7)) == DiscreteSpace(7)
    assert action_space_of(gym.spaces.MultiBinary(3)) == MultiDiscreteSpace((2, 2, 2))
    assert action_space_of(gym.spaces.MultiDiscrete([3, 2])) == MultiDiscreteSpace((3, 2))
    box = leaf_space(gym.spaces.Box(np.array([-1.0, -np.inf]), np.array([1.0, 2.0]), dtype=np.float64))
    assert box == BoxSpace((2,), "float32", (-1.0, -float("inf")), (1.0, 2.0))
    with pytest.raises(EnvError, match="no array form"):
        ObsCodec(gym.spaces.Sequence(gym.spaces.Discrete(3)))


def test_unknown_ids_name_the_nearest() -> None:
    with pytest.raises(EnvError, match="did you mean CartPole-v1"):
        make_env(EnvConfig(id="CartPol-v1"), seed=0)
    with pytest.raises(EnvError, match="did you mean Strange"):
        make_env(EnvConfig(id=f"{HERE}:Strnge"), seed=0)
    with pytest.raises(EnvError, match="cannot import"):
        find_target("no.such.module:Env")
    with pytest.raises(EnvError, match="could not be made"):
        make_env(EnvConfig(id="Pendulum-v1", kwargs={"gravity": 1.0}), seed=0)
    with pytest.raises(EnvError, match="could not be made: RuntimeError: no display"):
        make_env(EnvConfig(id=f"{HERE}:Strange", kwargs={"trouble": "make"}), seed=0)


def test_an_id_may_name_the_module_that_registers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = gym.envs.registration.EnvSpec("Odd-v0", entry_point=Strange, max_episode_steps=7)
    monkeypatch.setitem(gym.registry, "Odd-v0", spec)
    stepper = make_env(EnvConfig(id=f"{HERE}:Odd-v0", num_envs=2), seed=0)
    assert not any(stepper.step(np.zeros(2, np.int64) + 5).truncated_N.any() for _ in range(6))
    assert stepper.step(np.zeros(2, np.int64) + 5).truncated_N.all()
    stepper.close()
    with pytest.raises(EnvError, match="did you mean Strange"):
        make_env(EnvConfig(id=f"{HERE}:Strang-v0"), seed=0)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_envs=0"):
        EnvConfig(num_envs=0)
    with pytest.raises(ConfigError, match="time_limit=0"):
        EnvConfig(time_limit=0)
    with pytest.raises(ConfigError, match="no native vector environment"):
        make_env(EnvConfig(id="Pendulum-v1", vectoriser="native"), seed=0)
    with pytest.raises(ConfigError, match="did you mean 'sutton_barto_reward'"):
        make_env(EnvConfig(vectoriser="native", kwargs={"sutton_barto": True}), seed=0)
    with pytest.raises(ConfigError, match="seed=-1"):
        make_env(EnvConfig(), seed=-1)


def test_wrong_actions_are_refused() -> None:
    stepper = make_env(EnvConfig(num_envs=3, vectoriser="sync"), seed=0)
    with pytest.raises(InputError, match=r"shape \(2,\), expected \(3,\)"):
        stepper.step(np.zeros(2, np.int64))
    with pytest.raises(InputError, match="dtype float64, expected integers"):
        stepper.step(np.zeros(3))


@pytest.mark.parametrize(("trouble", "what"), [("obs", "observation 'outer.inner'"), ("reward", "reward")])
def test_not_a_number_names_environment_and_step(trouble: str, what: str) -> None:
    config = EnvConfig(id=f"{HERE}:Strange", num_envs=2, vectoriser="sync", kwargs={"trouble": trouble})
    stepper = make_env(config, seed=0)
    stepper.step(np.full(2, 5))
    stepper.step(np.full(2, 5))
    with pytest.raises(EnvError, match=rf"environment 0 gave a NaN or infinite {what} on step 3"):
        stepper.step(np.full(2, 5))


@pytest.mark.parametrize(
    ("trouble", "error", "what"),
    [
        ("crash", EnvError, "worker 0 .* failed during 'step'(.|\n)*ZeroDivisionError: inside the environment"),
        ("die", EnvError, "worker 0 .* died during 'step'; its exit code is -9"),
        ("hang", DeadlineError, "did not finish 'step' in deadline_s=0.5"),
    ],
)
def test_trouble_in_a_worker_is_named(trouble: str, error: type[Exception], what: str) -> None:
    config = EnvConfig(
        id=f"{HERE}:Strange",
        num_envs=2,
        vectoriser="async",
        num_workers=1,
        deadline_s=120.0,
        kwargs={"trouble": trouble},
    )
    stepper = make_env(config, seed=0)
    try:
        stepper.step(np.full(2, 5))
        stepper.step(np.full(2, 5))
        if trouble == "hang":
            stepper.env._deadline_s = 0.5  # only now: starting a worker takes seconds on a slow machine
        with pytest.raises(error, match=what):
            stepper.step(np.full(2, 5))
    finally:
        if trouble == "hang":
            stepper.env._processes[0].kill()  # it would not end by itself, and close would wait for it
        stepper.close()


class Faulty(gym.Env):
    """Breaks the Gymnasium contract in environment-specific ways, on the second step or at reset."""

    def __init__(self, fault: str, kind: str = "box") -> None:
        spaces = {"box": gym.spaces.Box(-1, 1, (2,), np.float32), "choice": gym.spaces.Discrete(4)}
        self.observation_space, self.action_space = spaces[kind], gym.spaces.Discrete(2)
        self.fault, self.count = fault, 0
        self.good = np.zeros(2, np.float32) if kind == "box" else 1

    def reset(self, *, seed=None, options=None):
        self.count = 0
        if self.fault == "reset":
            raise ZeroDivisionError("inside reset")
        return self.good, {}

    def step(self, action):
        self.count += 1
        good = (self.good, 0.5, False, False, {})
        if self.count < 2:
            return good
        if self.fault == "step":
            raise ZeroDivisionError("inside step")
        faults = {
            "four": (self.good, 0.5, False, {}),
            "nothing": None,
            "flags": (self.good, 0.5, np.array([True, False]), False, {}),
            "reward": (self.good, "much", False, False, {}),
            "array reward": (self.good, np.array([0.5]), False, False, {}),
            "array flags": (self.good, 0.5, np.array([True]), np.array([False]), {}),
            "shape": (np.zeros(1, np.float32), 0.5, False, False, {}),
            "scalar": (0.0, 0.5, False, False, {}),
            "complex": (np.zeros(2, complex), 0.5, False, False, {}),
            "real": (0.5, 0.5, False, False, {}),
            "double": (np.zeros(2), 0.5, False, False, {}),
        }
        return faults[self.fault]


FAULTS = [
    ("reset", "box", "raised ZeroDivisionError in reset: inside reset .*test_stepper.py:[0-9]+, in reset"),
    ("step", "box", "raised ZeroDivisionError in step: inside step .*test_stepper.py:[0-9]+, in step"),
    ("four", "box", r"returned \(ndarray, float, bool, dict\); return five"),
    ("nothing", "box", r"returned \(NoneType\); return five"),
    ("flags", "box", "both ends as bool"),
    ("reward", "box", "its reward is 'much'; return one number"),
    ("shape", "box", r"shape \(1,\) and dtype float32, but its space declares shape \(2,\)"),
    ("scalar", "box", r"shape \(\) and dtype float64, but its space declares shape \(2,\)"),
    ("complex", "box", "dtype complex128, but its space declares .* dtype float32"),
    ("real", "choice", "dtype float64, but its space declares .* dtype int64"),
]


@pytest.mark.parametrize(("fault", "kind", "what"), FAULTS)
def test_a_faulty_environment_is_named(fault: str, kind: str, what: str) -> None:
    config = EnvConfig(
        id=f"{HERE}:Faulty", num_envs=2, vectoriser="sync", kwargs={"fault": fault, "kind": kind}, time_limit=None
    )

    def run() -> None:
        stepper = make_env(config, seed=0)
        stepper.step(np.zeros(2, np.int64))
        stepper.step(np.zeros(2, np.int64))

    with pytest.raises(EnvError, match=rf"environment 0 \('{HERE}:Faulty'\)(.|\n)*{what}") as caught:
        run()
    if fault in ("reset", "step"):
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_second_environment_is_named_too_and_harmless_forms_are_taken() -> None:
    config = EnvConfig(id=f"{HERE}:Faulty", num_envs=2, vectoriser="sync", kwargs={"fault": "step"})
    stepper = make_env(config, seed=0)
    stepper.env.envs[0].unwrapped.fault = "double"
    stepper.step(np.zeros(2, np.int64))
    with pytest.raises(EnvError, match="environment 1 "):
        stepper.step(np.zeros(2, np.int64))
    for fault in ("double", "array reward", "array flags"):
        stepper = make_env(
            EnvConfig(id=f"{HERE}:Faulty", num_envs=2, kwargs={"fault": fault}, autoreset="next_step"), seed=0
        )
        for _ in range(2):
            step = stepper.step(np.zeros(2, np.int64))
        assert step.obs.dtype == np.float32
        assert step.reward_N.tolist() == [0.5, 0.5]
        assert step.terminated_N.tolist() == [fault == "array flags"] * 2


def test_auto_takes_the_native_form_where_it_pays() -> None:
    assert make_env(EnvConfig(num_envs=1), seed=0).describe()["vectoriser"] == "sync"
    about = make_env(EnvConfig(num_envs=8), seed=0).describe()
    assert (about["vectoriser"], about["restore"], about["autoreset"]) == ("native", "arrays", "same_step")
    assert make_env(EnvConfig(id="Pendulum-v1"), seed=0).describe()["vectoriser"] == "sync"


def test_time_limit_truncates() -> None:
    stepper = make_env(EnvConfig(id="Pendulum-v1", num_envs=2, time_limit=5), seed=0)
    ends = [stepper.step(np.zeros((2, 1), np.float32)).truncated_N.all() for _ in range(10)]
    assert ends == [False] * 4 + [True] + [False] * 4 + [True]


def test_state_of_another_shape_is_refused() -> None:
    state = make_env(EnvConfig(num_envs=2), seed=0).state_dict()
    with pytest.raises(InputError, match="num_envs=2, this one has 3"):
        make_env(EnvConfig(num_envs=3), seed=0).load_state_dict(state)


def test_an_environment_that_is_not_restorable_starts_over_under_a_new_seed() -> None:
    pytest.importorskip("envpool", reason="extra: envpool")
    config = EnvConfig(num_envs=2, vectoriser="envpool")
    one, two = make_env(config, seed=0), make_env(config, seed=0)
    first = two.obs.copy()
    one.step(np.zeros(2, np.int64))
    assert not two.load_state_dict(one.state_dict())
    assert two.starts_N.all()
    assert not two.exact_N.any()
    assert (two.obs != first).any()
    one.close()
    two.close()


class Noisy(gym.Env):
    """Ignores its seed."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = gym.spaces.Box(-9, 9, (1,), np.float32), gym.spaces.Discrete(2)
        self.rng = np.random.default_rng(id(self))

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return self.rng.uniform(-1, 1, 1).astype(np.float32), 0.0, False, False, {}


def test_a_replay_that_does_not_come_out_the_same_is_reported() -> None:
    one, two = (make_env(EnvConfig(id=f"{HERE}:Noisy", num_envs=2), seed=0) for _ in range(2))
    one.step(np.zeros(2, np.int64))
    assert not two.load_state_dict(one.state_dict())
    assert not two.exact_N.any()
    two.step(np.zeros(2, np.int64))


def test_pictures_come_from_the_rendering_form() -> None:
    pytest.importorskip("pygame", reason="extra: classic")
    config = EnvConfig(num_envs=8)
    with pytest.raises(EnvError, match="no picture"):
        make_env(config, seed=0).render()
    stepper = make_env(rendering(config), seed=0)
    frame = stepper.render()
    assert frame.shape == (400, 600, 3)
    assert frame.dtype == np.uint8
    stepper.close()
