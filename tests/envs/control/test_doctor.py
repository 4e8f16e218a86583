"""The doctor finds what is wrong with an environment and tells what it measured."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

from lockstep.core.errors import EnvError
from lockstep.envs.control import EnvConfig, make_env
from lockstep.envs.control.doctor import DoctorReport, Rate, Threads, diagnose, measure_threads, random_actions

HERE = "tests.envs.control.test_doctor"
FORMS = ["gymnasium sync", "native", "sync", "async", "envpool"]


class Sick(gym.Env):
    """Unbounded actions, huge rewards, noise without a seed."""

    def __init__(self, breaks: bool = False) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.breaks = breaks

    def reset(self, *, seed=None, options=None):
        return np.zeros(2), {}

    def step(self, action):
        noise = np.random.default_rng().normal(size=2)
        return noise * (np.nan if self.breaks else 1), 1000.0, False, False, {}


@pytest.fixture(scope="module")
def cartpole() -> DoctorReport:
    return diagnose(EnvConfig(num_envs=8), seconds_per_rate=0.05)


def test_report_of_a_healthy_environment(cartpole: DoctorReport) -> None:
    assert {finding.level for finding in cartpole.findings} <= {"ok", "note"}
    assert any(finding.text.startswith("deterministic") for finding in cartpole.findings)
    assert sorted(rate.form for rate in cartpole.rates) == sorted(FORMS)
    # A step takes microseconds; one a second would be the rate of something else, on any machine.
    assert all(rate.steps_per_s > 1 for rate in cartpole.rates if not rate.error)
    assert cartpole.auto == "native"
    assert not cartpole.rates[1].error


def test_text_names_every_form_and_the_choice(cartpole: DoctorReport) -> None:
    text = str(cartpole)
    assert all(form in text for form in FORMS)
    assert "vectoriser='auto' takes native" in text
    assert "threads: " in text


def test_wall_time_is_stepping_plus_learning(cartpole: DoctorReport) -> None:
    report = replace(cartpole, rates=[Rate("native", 50_000.0)])
    assert report.predict_wall_time(1_000_000, 30.0) == pytest.approx(50.0)
    with pytest.raises(ValueError, match="no rate"):
        replace(cartpole, rates=[]).predict_wall_time(1, 1.0)


def test_a_faster_form_than_autos_is_named(cartpole: DoctorReport) -> None:
    report = replace(cartpole, rates=[Rate("native", 10.0), Rate("async", 20.0), Rate("gymnasium sync", 99.0)])
    assert "measured here, async is faster" in str(report)


def test_findings_of_a_sick_environment() -> None:
    report = diagnose(EnvConfig(id=f"{HERE}:Sick", num_envs=2), seconds_per_rate=0.01)
    text = str(report)
    for remark in ("no bounds", "float64", "rewards reach 1e+03", "not deterministic", "no episode ended"):
        assert remark in text


def test_nan_is_a_problem_not_a_crash() -> None:
    report = diagnose(EnvConfig(id=f"{HERE}:Sick", num_envs=2, kwargs={"breaks": True}), seconds_per_rate=0.01)
    assert report.findings[-1].level == "problem"
    assert "NaN" in report.findings[-1].text


def test_an_unknown_environment_raises() -> None:
    with pytest.raises(EnvError, match="unknown environment"):
        diagnose(EnvConfig(id="Nope-v0"))


def test_thread_advice() -> None:
    assert "another process holds a core" in Threads(160.0, 8000.0, 2).advice
    assert "gains nothing" in Threads(160.0, 150.0, 2).advice
    assert "two threads pay" in Threads(160.0, 80.0, 2).advice
    assert measure_threads().one_us > 1


def test_random_actions_respect_masks_and_bounds() -> None:
    stepper = make_env(EnvConfig(id="Taxi-v4", num_envs=16), seed=0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions = random_actions(stepper, rng)
        assert stepper.obs["action_mask"][np.arange(16), actions].all()
        stepper.step(actions)
    pendulum = make_env(EnvConfig(id="Pendulum-v1", num_envs=64), seed=0)
    actions = random_actions(pendulum, rng)
    assert actions.dtype == np.float32
    assert 1.0 < np.abs(actions).max() <= 2.0
