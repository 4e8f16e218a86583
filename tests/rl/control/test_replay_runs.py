"""Replay algorithms: a resumed run is the uninterrupted one, the same seed is the same run, every switch runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.core.errors import ConfigError
from lockstep.envs.control.config import EnvConfig
from lockstep.models.control.spec import NetworkConfig
from lockstep.rl.control import dqn, sac, td3, tqc
from lockstep.rl.offpolicy import ReplayConfig
from lockstep.rl.session import Result, RunConfig, Session
from lockstep.runs.directory import RunDirectory

SMALL = NetworkConfig(hidden_sizes=(16, 16), activation="relu", init="uniform")
REPLAY = ReplayConfig(buffer_size=150, batch_size=8, learning_starts=40, train_freq=2, gradient_steps=2, n_step=2)
RUN = RunConfig(total_steps=240, log_every=20, checkpoint_every=100, final_episodes=0, tensorboard=False)
CARTPOLE, PENDULUM = EnvConfig(num_envs=1), EnvConfig(id="Pendulum-v1", num_envs=2, time_limit=30)

DQN = dqn.DQNConfig(env=CARTPOLE, network=SMALL, replay=REPLAY, run=RUN, target_every=20)
SAC = sac.SACConfig(env=PENDULUM, network=SMALL, replay=REPLAY, run=RUN)
TD3 = td3.TD3Config(env=PENDULUM, network=SMALL, replay=REPLAY, run=RUN)
TQC = tqc.TQCConfig(env=PENDULUM, network=SMALL, replay=REPLAY, run=RUN)
RAINBOW = replace(
    DQN, double=True, dueling=True, noisy=True, prioritised=True, distribution="categorical", support=(0.0, 50.0)
)
CASES: dict[str, tuple[Callable[..., Result], Any]] = {
    "dqn": (dqn.train, DQN),
    "dqn-soft-target": (dqn.train, replace(DQN, tau=0.1)),
    "dqn-quantile": (dqn.train, replace(DQN, distribution="quantile", num_atoms=7)),
    "rainbow": (dqn.train, RAINBOW),
    "sac": (sac.train, SAC),
    "sac-normalised": (sac.train, replace(SAC, normalise_obs=True)),
    "sac-discrete": (sac.train, replace(SAC, env=CARTPOLE)),
    "sac-fixed-temperature": (sac.train, replace(SAC, temperature=0.2)),
    "td3": (td3.train, TD3),
    "ddpg": (td3.train, td3.ddpg(TD3)),
    "tqc": (tqc.train, TQC),
}


class Killed(Exception):
    pass


class Curve:
    """Keeps the metrics of every line, without the times."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.lines: dict[int, dict[str, float]] = {}
        self.kill_at = kill_at

    def __call__(self, step: int, total: int, metrics: Any) -> None:
        if self.kill_at is not None and step >= self.kill_at:
            raise Killed
        self.lines[step] = {name: value for name, value in metrics.items() if name != "steps_per_s"}


def run(train: Callable[..., Result], config: Any, **kwargs: Any) -> tuple[Result, dict[int, dict[str, float]]]:
    curve = Curve()
    return train(config, Session(config.run, config.env, on_progress=curve, **kwargs)), curve.lines


def assert_same_policy(one: Result, two: Result) -> None:
    first, second = one.policy.state_dict(), two.policy.state_dict()
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


TAKES_LONG = ("rainbow", "dqn-quantile", "sac-normalised", "sac-discrete", "sac-fixed-temperature", "tqc", "ddpg")
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name in TAKES_LONG else name for name in CASES]


@pytest.mark.parametrize("name", EVERY)
def test_a_killed_run_resumes_to_the_same_weights_and_metrics(name: str, tmp_path: Path) -> None:
    train, config = CASES[name]
    whole, curve = run(train, config)
    directory = RunDirectory.create(tmp_path, "run", config, 1)
    session = Session(config.run, config.env, directory=directory, on_progress=Curve(kill_at=160))
    with pytest.raises(Killed), directory:
        train(config, session)
    session.sink.close()
    directory = RunDirectory.open(directory.path)
    with directory:
        resumed, rest = run(train, config, directory=directory, resume=True)
    assert resumed.steps == whole.steps
    assert_same_policy(resumed, whole)
    assert rest
    assert min(rest) > 100
    assert rest == {step: curve[step] for step in rest}


@pytest.mark.parametrize(
    "name", ["dqn", "sac", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rainbow", "tqc"))]
)
def test_the_same_seed_is_the_same_run_and_another_is_not(name: str) -> None:
    train, config = CASES[name]
    one, curve = run(train, config)
    two, again = run(train, config)
    other, _ = run(train, replace(config, run=replace(RUN, seed=2)))
    assert_same_policy(one, two)
    assert curve == again
    assert one.policy.digest() != other.policy.digest()


@pytest.mark.parametrize(
    ("name", "switch"),
    [("dqn", dqn), ("dqn-soft-target", dqn), ("sac", sac), ("sac-normalised", sac), ("sac-fixed-temperature", sac)],
)
def test_compiled_gradient_steps_learn_what_autograd_learns(
    name: str, switch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = CASES[name]
    compiled, curve = run(train, config)
    monkeypatch.setattr(switch, "_fused", lambda *parts: None)
    composed, expected = run(train, config)
    assert_same_policy(compiled, composed)
    assert list(curve) == list(expected)
    for step, line in curve.items():
        assert line == pytest.approx(expected[step], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_learning_moves_the_policy_and_stays_finite(name: str) -> None:
    train, config = CASES[name]
    untrained = replace(config, replay=replace(REPLAY, learning_starts=1000))
    before, after = run(train, untrained)[0], run(train, config)[0]
    assert before.policy.digest() != after.policy.digest()
    assert all(bool(torch.isfinite(p).all()) for p in after.policy.parameters())


@pytest.mark.slow
def test_no_noise_is_left_in_a_trained_noisy_policy() -> None:
    policy = run(*CASES["rainbow"])[0].policy
    features = torch.zeros(1, 4)
    with torch.no_grad():
        once = policy.actor(features)
        policy.actor.set_noise(None)
        assert torch.equal(once, policy.actor(features))


def test_recurrent_policies_and_stacks_of_normalised_frames_are_refused() -> None:
    recurrent = replace(SAC, network=replace(SMALL, recurrent="lstm"))
    with pytest.raises(ConfigError, match="recurrent"):
        run(sac.train, recurrent)
    with pytest.raises(ConfigError, match="frame_stack"):
        run(sac.train, replace(SAC, normalise_obs=True, frame_stack=2))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ReplayConfig(batch_size=0), "batch_size"),
        (lambda: ReplayConfig(gradient_steps=0), "gradient_steps"),
        (lambda: run(dqn.train, replace(DQN, tau=0.0)), "tau"),
        (lambda: run(dqn.train, replace(DQN, distribution="categorical", support=(1.0, 1.0))), "support"),
        (lambda: run(td3.train, replace(TD3, policy_delay=0)), "policy_delay"),
        (lambda: run(tqc.train, replace(TQC, num_dropped=25)), "num_dropped"),
        (lambda: run(sac.train, replace(SAC, temperature_init=0.0)), "temperature"),
        (lambda: run(dqn.train, replace(DQN, env=PENDULUM)), "Discrete"),
    ],
)
def test_configurations_that_cannot_run_say_so(make: Callable[[], Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make()
