"""Every vectoriser in every autoreset mode gives the same transitions.

The counter environment writes its step, episode length and kind of ending into its observation; the expected
transitions are computed here from the episode seeds alone, without any vector environment.
"""

# N environments

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from lockstep.core.errors import EnvError
from lockstep.envs.control import EnvConfig, Stepper, episode_seed, make_env
from lockstep.envs.control.conformance import NUM_ACTIONS
from lockstep.envs.control.gymnasium_forms import gymnasium_stepper
from lockstep.envs.control.make import MODES, seeded_makers

NUM_ENVS, NUM_TRANSITIONS, LONGEST, SEED = 5, 40, 7, 11
SINGLE, NATIVE = "lockstep.envs.control.conformance:CounterEnv", "lockstep.envs.control.conformance:CounterSim"


class Transition(NamedTuple):
    obs: tuple[float, ...]
    action: int
    reward: float
    next_obs: tuple[float, ...]
    terminated: bool
    truncated: bool


def action_of(env_index: int, count: int) -> int:
    """Action of an environment's transition number `count`: a function of these alone."""
    return (count * (env_index + 2) + count // 3) % NUM_ACTIONS


def expected(env_index: int) -> list[Transition]:
    transitions: list[Transition] = []
    episode = 0
    while len(transitions) < NUM_TRANSITIONS:
        seed = episode_seed(SEED, env_index, episode)
        length, terminates = 1 + seed % LONGEST, seed // LONGEST % 2 == 0
        obs = (0.0, float(length), float(terminates), 0.0)
        for step in range(1, length + 1):
            action = action_of(env_index, len(transitions))
            next_obs = (float(step), float(length), float(terminates), 1000.0 * action)
            ended = step == length
            reward = float(np.float32(step + action / 10))
            transitions.append(
                Transition(obs, action, reward, next_obs, ended and terminates, ended and not terminates)
            )
            obs = next_obs
        episode += 1
    return transitions[:NUM_TRANSITIONS]


def collect(stepper: Stepper) -> list[list[Transition]]:
    """First transitions of each environment, as a collector would record them."""
    kept: list[list[Transition]] = [[] for _ in range(NUM_ENVS)]
    obs = stepper.reset(SEED)
    while min(map(len, kept)) < NUM_TRANSITIONS:
        actions = np.array([action_of(i, len(kept[i])) for i in range(NUM_ENVS)])
        step = stepper.step(actions)
        for i in np.flatnonzero(step.valid_N).tolist():
            kept[i].append(
                Transition(
                    tuple(obs[i].tolist()),
                    int(actions[i]),
                    float(step.reward_N[i]),
                    tuple(step.next_obs[i].tolist()),
                    bool(step.terminated_N[i]),
                    bool(step.truncated_N[i]),
                )
            )
        obs = step.obs
    return [transitions[:NUM_TRANSITIONS] for transitions in kept]


def build(form: str, autoreset: Any) -> Stepper:
    vectoriser: Any = form
    config = EnvConfig(id=SINGLE, num_envs=NUM_ENVS, autoreset=autoreset, num_workers=2)
    if form == "native":
        return make_env(EnvConfig(id=NATIVE, num_envs=NUM_ENVS, autoreset=autoreset), seed=0)
    if form == "gymnasium sync":
        return gymnasium_stepper(seeded_makers(config), MODES[autoreset], "sync")
    if form == "gymnasium async":
        return gymnasium_stepper(seeded_makers(config), MODES[autoreset], "async")
    return make_env(EnvConfig(id=SINGLE, num_envs=NUM_ENVS, autoreset=autoreset, vectoriser=vectoriser), seed=0)


FORMS = ["sync", "async", "native", "gymnasium sync", "gymnasium async"]


@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
@pytest.mark.parametrize("form", FORMS)
def test_transitions_are_the_same_in_every_form(form: str, autoreset: str) -> None:
    stepper = build(form, autoreset)
    try:
        assert stepper.mode is MODES[autoreset]
        assert collect(stepper) == [expected(i) for i in range(NUM_ENVS)]
    finally:
        stepper.close()


def test_the_expected_transitions_contain_both_endings_and_one_step_episodes() -> None:
    ends = [transition for i in range(NUM_ENVS) for transition in expected(i) if transition.next_obs[1] == 1]
    assert {end.terminated for end in ends} == {True, False}


@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
@pytest.mark.parametrize("form", FORMS)
def test_a_restored_environment_goes_on_as_the_saved_one(form: str, autoreset: str) -> None:
    one, two = build(form, autoreset), build(form, autoreset)
    try:
        one.reset(SEED)
        rng = np.random.default_rng(0)
        for _ in range(17):
            one.step(rng.integers(0, NUM_ACTIONS, NUM_ENVS))
        state = one.state_dict()
        two.reset(99)
        two.step(np.zeros(NUM_ENVS, np.int64))
        assert two.load_state_dict(state)
        assert two.exact_N.all()
        np.testing.assert_array_equal(one.obs, two.obs)
        for _ in range(30):
            actions = rng.integers(0, NUM_ACTIONS, NUM_ENVS)
            a, b = one.step(actions), two.step(actions)
            for name in ("obs", "next_obs", "reward_N", "terminated_N", "truncated_N", "valid_N", "starts_N"):
                np.testing.assert_array_equal(_field(a, name), _field(b, name), err_msg=name)
            assert a.episodes == b.episodes
    finally:
        one.close()
        two.close()


@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
def test_episode_ends_report_unclipped_returns_and_lengths(autoreset: Any) -> None:
    stepper = make_env(EnvConfig(id=SINGLE, num_envs=2, autoreset=autoreset, clip_reward=True), seed=SEED)
    seen: list[list[tuple[float, int]]] = [[], []]
    for _ in range(60):
        step = stepper.step(np.zeros(2, np.int64))
        assert set(step.reward_N[step.valid_N].tolist()) <= {1.0}
        for end in step.episodes:
            seen[end.env_index].append((end.episode_return, end.length))
    for i, ends in enumerate(seen):
        lengths = [1 + episode_seed(SEED, i, k) % LONGEST for k in range(len(ends))]
        assert ends == [(length * (length + 1) / 2, length) for length in lengths]
        assert len(ends) > 5


def _field(step: Any, name: str) -> np.ndarray:
    fields: dict[str, Callable[[], np.ndarray]] = {
        "obs": lambda: step.obs,
        "next_obs": lambda: step.next_obs,
        "reward_N": lambda: step.reward_N,
        "terminated_N": lambda: step.terminated_N,
        "truncated_N": lambda: step.truncated_N,
        "valid_N": lambda: step.valid_N,
        "starts_N": lambda: step.starts_N,
    }
    return fields[name]()


def test_envpool_dummy_rows_are_no_transitions() -> None:
    pytest.importorskip("envpool", reason="extra: envpool")
    config = EnvConfig(id="CartPole-v1", num_envs=3, vectoriser="envpool", time_limit=9)
    stepper = make_env(config, seed=0)
    try:
        obs = stepper.reset(4)
        counts = np.zeros(3, int)
        lengths: list[int] = []
        for k in range(60):
            step = stepper.step(np.array([k % 2, 0, 1]))
            counts += step.valid_N
            # CartPole's reward is 1 for every true step and EnvPool's 0 for a reset row.
            np.testing.assert_array_equal(step.reward_N == 1.0, step.valid_N)
            # Every transition continues from the observation acted on: position moves by velocity times 20 ms.
            moved = obs[:, 0] + np.float32(0.02) * obs[:, 1]
            np.testing.assert_allclose(step.next_obs[step.valid_N, 0], moved[step.valid_N], atol=1e-5)
            for end in step.episodes:
                assert step.truncated_N[end.env_index] == (end.length == 9 and not step.terminated_N[end.env_index])
                assert end.length == counts[end.env_index]
                counts[end.env_index] = 0
                lengths.append(end.length)
            obs = step.obs
        assert 9 in lengths
        again = make_env(config, seed=4)
        np.testing.assert_array_equal(again.obs, stepper.reset(4))
        again.close()
    finally:
        stepper.close()


class Catch(NamedTuple):
    """What EnvPool's Catch shows of itself: row and column of the ball, which falls one row a step, and the paddle's."""

    row: int
    ball: int
    paddle: int

    def cells(self) -> set[tuple[int, int]]:
        return {(self.row, self.ball), (9, self.paddle)}


def cells_of(board: np.ndarray) -> set[tuple[int, int]]:
    return {(row, column) for row, column in np.argwhere(board.reshape(10, 5)).tolist()}


def reset_of(board: np.ndarray) -> Catch:
    (first, ball), (last, paddle) = sorted(cells_of(board))
    assert (first, last) == (0, 9)
    return Catch(0, ball, paddle)


@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
def test_envpool_gives_the_transitions_of_its_step_counter(autoreset: Any) -> None:
    """Whatever mode is asked for, EnvPool resets with the next step and says so. The expected transitions follow from the
    ball's column at each reset and the actions; a reset row taken for a transition would break the count."""
    pytest.importorskip("envpool", reason="extra: envpool")
    config = EnvConfig(id="Catch-v0", num_envs=3, vectoriser="envpool", autoreset=autoreset)
    env = make_env(config, seed=SEED)
    try:
        assert env.mode is MODES["next_step"]
        assert env.describe()["autoreset_asked"] == autoreset
        obs = env.reset(SEED)
        here = [reset_of(board) for board in obs]
        taken, returns = [0] * 3, [0.0] * 3
        num_ends = 0
        for _ in range(60):
            assert [cells_of(board) for board in obs] == [state.cells() for state in here]
            actions = [action_of(i, taken[i]) for i in range(3)]
            step = env.step(np.array(actions))
            ends = {end.env_index: end for end in step.episodes}
            for i in range(3):
                if not step.valid_N[i]:
                    assert step.starts_N[i], "only the step that resets is no transition"
                    here[i] = reset_of(step.obs[i])
                    continue
                taken[i] += 1
                row, ball, paddle = here[i]
                expected = Catch(row + 1, ball, min(max(paddle + actions[i] - 1, 0), 4))
                assert cells_of(step.next_obs[i]) == expected.cells()
                caught = 1.0 if expected.ball == expected.paddle else -1.0
                assert step.terminated_N[i] == (expected.row == 9)
                assert not step.truncated_N[i]
                assert step.reward_N[i] == (caught if expected.row == 9 else 0.0)
                returns[i] += float(step.reward_N[i])
                assert (i in ends) == step.terminated_N[i]
                if i in ends:
                    assert (ends[i].length, ends[i].episode_return) == (expected.row, returns[i])
                    returns[i], num_ends = 0.0, num_ends + 1
                here[i] = expected
            obs = step.obs
        assert num_ends >= 15
    finally:
        env.close()


def test_envpool_that_ignores_the_time_limit_is_an_error() -> None:
    """Catch, for one, plays on whatever limit it is given."""
    pytest.importorskip("envpool", reason="extra: envpool")
    env = make_env(EnvConfig(id="Catch-v0", num_envs=2, vectoriser="envpool", time_limit=5), seed=SEED)
    try:
        for _ in range(4):
            env.step(np.zeros(2, np.int64))
        with pytest.raises(EnvError, match="time_limit=5"):
            env.step(np.zeros(2, np.int64))
    finally:
        env.close()
