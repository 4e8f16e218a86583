"""Replay and offline algorithms solve small problems, each within a minute or so on one core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.envs.control.config import EnvConfig
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig
from lockstep.rl.control import bc, dqn, iql, ppo, sac, td3, tqc
from lockstep.rl.dataset import collect_dataset
from lockstep.rl.offpolicy import ReplayConfig
from lockstep.rl.session import RunConfig, Session

PENDULUM = EnvConfig(id="Pendulum-v1", num_envs=1)
SMALL = NetworkConfig(hidden_sizes=(64, 64), activation="relu", init="uniform")

DQN = dqn.DQNConfig(
    network=SMALL,
    replay=ReplayConfig(buffer_size=100_000, batch_size=64, learning_starts=1_000, train_freq=256, gradient_steps=128),
    run=RunConfig(total_steps=50_000, eval_every=2_000, stop_at_return=475.0, final_episodes=30),
    learning_rate=2.3e-3,
    target_every=10,
    exploration_fraction=0.16,
    epsilon_end=0.04,
)
SAC = sac.SACConfig(
    env=PENDULUM,
    network=SMALL,
    learning_rate=3e-3,
    run=RunConfig(total_steps=6_000, eval_every=1_000, stop_at_return=-200.0, final_episodes=20),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        DQN,
        replace(DQN, double=True, dueling=True, prioritised=True, replay=replace(DQN.replay, n_step=3)),
        replace(DQN, distribution="quantile", num_atoms=25),
        replace(DQN, distribution="categorical", support=(0.0, 100.0), replay=replace(DQN.replay, n_step=3)),
    ],
    ids=["plain", "double-dueling-prioritised", "quantile", "categorical"],
)
def test_dqn_balances_cartpole(config: dqn.DQNConfig) -> None:
    result = dqn.train(config, Session(config.run, config.env))
    assert result.evaluation.mean >= 400, str(result.evaluation)


@pytest.mark.slow
def test_sac_swings_up_the_pendulum() -> None:
    result = sac.train(SAC, Session(SAC.run, SAC.env))
    assert result.evaluation.mean >= -250, str(result.evaluation)


@pytest.mark.slow
def test_discrete_sac_balances_cartpole() -> None:
    config = replace(
        SAC,
        env=EnvConfig(num_envs=1),
        run=RunConfig(total_steps=30_000, eval_every=3_000, stop_at_return=450.0, final_episodes=30),
        replay=ReplayConfig(batch_size=64, learning_starts=1_000, n_step=3, train_freq=4, gradient_steps=2),
        temperature=0.05,
        tau=0.01,
    )
    result = sac.train(config, Session(config.run, config.env))
    assert result.evaluation.mean >= 400, str(result.evaluation)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["td3", "ddpg"])
def test_td3_swings_up_the_pendulum(variant: str) -> None:
    run = RunConfig(total_steps=10_000, eval_every=1_000, stop_at_return=-200.0, final_episodes=20)
    replay = ReplayConfig(batch_size=128, learning_starts=1_000)
    config = td3.TD3Config(env=PENDULUM, network=SMALL, run=run, replay=replay, learning_rate=3e-3)
    config = td3.ddpg(config) if variant == "ddpg" else config
    result = td3.train(config, Session(config.run, config.env))
    assert result.evaluation.mean >= -250, str(result.evaluation)


@pytest.mark.slow
def test_tqc_swings_up_the_pendulum() -> None:
    run = RunConfig(total_steps=5_000, eval_every=1_000, stop_at_return=-200.0, final_episodes=20)
    replay = ReplayConfig(batch_size=128)
    config = tqc.TQCConfig(
        env=PENDULUM, network=SMALL, run=run, replay=replay, learning_rate=3e-3, num_quantiles=10, num_dropped=1
    )
    result = tqc.train(config, Session(config.run, config.env))
    assert result.evaluation.mean >= -250, str(result.evaluation)


@pytest.fixture(scope="module")
def cartpole_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained policy's own samples on CartPole."""
    config = ppo.PPOConfig(run=RunConfig(total_steps=60_000, final_episodes=0))
    policy = ppo.train(config, Session(config.run, config.env)).policy
    path = tmp_path_factory.mktemp("data") / "cartpole.npz"
    return collect_dataset(policy, config.env, steps=1_000, seed=5, path=path)


@pytest.fixture(scope="module")
def pendulum_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained policy's samples and a random policy's, on Pendulum."""
    run = RunConfig(total_steps=6_000, final_episodes=0)
    policy = sac.train(replace(SAC, run=run), Session(run, SAC.env)).policy
    folder = tmp_path_factory.mktemp("data")
    env = replace(PENDULUM, num_envs=8)
    return collect_dataset(policy, env, steps=8_000, seed=5, path=folder / "pendulum.npz")


@pytest.mark.slow
def test_cloning_reproduces_a_cartpole_policy(cartpole_data: Path) -> None:
    config = bc.BCConfig(dataset=str(cartpole_data), run=RunConfig(total_steps=3_000, final_episodes=30))
    result = bc.train(config, Session(config.run, config.env))
    assert result.evaluation.mean >= 400, str(result.evaluation)


@pytest.mark.slow
def test_cloning_reproduces_a_pendulum_policy(pendulum_data: Path) -> None:
    run = RunConfig(total_steps=5_000, final_episodes=20)
    config = bc.BCConfig(dataset=str(pendulum_data), env=PENDULUM, network=SMALL, run=run)
    result = bc.train(config, Session(config.run, config.env))
    assert result.evaluation.mean >= -300, str(result.evaluation)


@pytest.mark.slow
def test_iql_learns_from_a_cartpole_policys_data(cartpole_data: Path) -> None:
    run = RunConfig(total_steps=5_000, eval_every=1_000, stop_at_return=450.0, final_episodes=30)
    config = iql.IQLConfig(dataset=str(cartpole_data), network=SMALL, run=run, learning_rate=1e-3)
    result = iql.train(config, Session(config.run, config.env))
    assert result.evaluation.mean >= 400, str(result.evaluation)


@pytest.mark.slow
def test_iql_learns_from_a_pendulum_policys_data(pendulum_data: Path) -> None:
    run = RunConfig(total_steps=10_000, eval_every=1_000, stop_at_return=-250.0, final_episodes=20)
    config = iql.IQLConfig(
        dataset=str(pendulum_data), env=PENDULUM, network=SMALL, run=run, learning_rate=2e-3, temperature=10.0
    )
    result = iql.train(config, Session(config.run, config.env))
    assert result.evaluation.mean >= -300, str(result.evaluation)


def test_an_untrained_policy_is_far_from_these_scores() -> None:
    """The thresholds above mean something."""
    from lockstep.envs.control.make import make_env
    from lockstep.rl.evaluate import evaluate

    env = make_env(PENDULUM, seed=0)
    policy = Policy(SAC.policy_spec(env.obs_space, env.action_space), seed=0)
    env.close()
    assert evaluate(policy, PENDULUM, episodes=10, seed=0).mean < -600
