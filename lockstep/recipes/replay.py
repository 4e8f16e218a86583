"""Recipes of the replay and offline algorithms. Those named as RL-Zoo's take its tuned hyper-parameters (Raffin 2020)."""

from __future__ import annotations

from dataclasses import replace

from lockstep.envs.control.config import EnvConfig
from lockstep.models.control.spec import NetworkConfig
from lockstep.rl.control.bc import BCConfig
from lockstep.rl.control.distill import PolicyDistillConfig
from lockstep.rl.control.dqn import DQNConfig
from lockstep.rl.control.iql import IQLConfig
from lockstep.rl.control.sac import SACConfig
from lockstep.rl.control.td3 import TD3Config, ddpg
from lockstep.rl.control.tqc import TQCConfig
from lockstep.rl.offpolicy import ReplayConfig
from lockstep.rl.session import RunConfig


def _dense(*sizes: int) -> NetworkConfig:
    return NetworkConfig(hidden_sizes=sizes, activation="relu", init="uniform")


def dqn_cartpole() -> DQNConfig:
    """CartPole-v1 by DQN with RL-Zoo's hyper-parameters, 50,000 steps."""
    return DQNConfig(
        env=EnvConfig(id="CartPole-v1", num_envs=1),
        network=_dense(256, 256),
        run=RunConfig(total_steps=50_000),
        replay=ReplayConfig(
            buffer_size=100_000, batch_size=64, learning_starts=1000, train_freq=256, gradient_steps=128
        ),
        learning_rate=2.3e-3,
        target_every=10,
        epsilon_end=0.04,
        exploration_fraction=0.16,
    )


def rainbow_cartpole() -> DQNConfig:
    """CartPole-v1 by Rainbow: double, dueling, 3-step, prioritised, C51, noisy."""
    base = dqn_cartpole()
    return replace(
        base,
        network=_dense(128, 128),
        replay=ReplayConfig(
            buffer_size=50_000, batch_size=64, learning_starts=1000, train_freq=4, gradient_steps=1, n_step=3
        ),
        learning_rate=1e-3,
        target_every=500,
        double=True,
        dueling=True,
        noisy=True,
        prioritised=True,
        distribution="categorical",
        support=(0.0, 100.0),
    )


def qrdqn_cartpole() -> DQNConfig:
    """CartPole-v1 by QR-DQN with RL-Zoo's DQN hyper-parameters."""
    return replace(dqn_cartpole(), network=_dense(64, 64), distribution="quantile", num_atoms=25)


def dqn_lunarlander() -> DQNConfig:
    """LunarLander-v3 by double DQN with RL-Zoo's hyper-parameters, 100,000 steps."""
    return DQNConfig(
        env=EnvConfig(id="LunarLander-v3", num_envs=1),
        network=_dense(256, 256),
        run=RunConfig(total_steps=100_000),
        replay=ReplayConfig(buffer_size=50_000, batch_size=128, learning_starts=1, train_freq=4, gradient_steps=-1),
        learning_rate=6.3e-4,
        target_every=250,
        epsilon_end=0.1,
        exploration_fraction=0.12,
        double=True,
    )


def dqn_minatar_breakout() -> DQNConfig:
    """MinAtar/Breakout-v1 by double DQN with a small convolutional network."""
    return DQNConfig(
        env=EnvConfig(id="MinAtar/Breakout-v1", num_envs=1),
        network=NetworkConfig(
            hidden_sizes=(), activation="relu", encoder="small_cnn", encoder_size=128, init="uniform"
        ),
        run=RunConfig(total_steps=1_000_000),
        replay=ReplayConfig(buffer_size=100_000, batch_size=32, learning_starts=5000, train_freq=4),
        learning_rate=2.5e-4,
        target_every=1000,
        epsilon_end=0.1,
        exploration_fraction=0.1,
        double=True,
    )


def sac_pendulum() -> SACConfig:
    """Pendulum-v1 by SAC with RL-Zoo's hyper-parameters, 20,000 steps."""
    return SACConfig(
        env=EnvConfig(id="Pendulum-v1", num_envs=1),
        network=_dense(256, 256),
        run=RunConfig(total_steps=20_000),
        learning_rate=1e-3,
    )


def sac_pendulum_bf16() -> SACConfig:
    """sac-pendulum with bf16 products."""
    return replace(sac_pendulum(), network=replace(_dense(256, 256), compute_dtype="bf16"))


def sac_halfcheetah() -> SACConfig:
    """HalfCheetah-v5 by SAC, 256-256, bf16 products on two threads; --network.compute-dtype fp32 for full precision."""
    return SACConfig(
        env=EnvConfig(id="HalfCheetah-v5", num_envs=1),
        network=replace(_dense(256, 256), compute_dtype="bf16"),
        run=RunConfig(total_steps=1_000_000, threads=2),
        replay=ReplayConfig(learning_starts=10_000),
    )


def sac_cartpole() -> SACConfig:
    """CartPole-v1 by discrete SAC (Christodoulou 2019) with a fixed temperature."""
    return SACConfig(
        env=EnvConfig(id="CartPole-v1", num_envs=1),
        network=_dense(64, 64),
        run=RunConfig(total_steps=30_000),
        replay=ReplayConfig(buffer_size=30_000, batch_size=128, learning_starts=1000, n_step=3),
        learning_rate=3e-3,
        tau=0.01,
        temperature=0.05,
    )


def td3_pendulum() -> TD3Config:
    """Pendulum-v1 by TD3 with RL-Zoo's hyper-parameters, 20,000 steps."""
    return TD3Config(
        env=EnvConfig(id="Pendulum-v1", num_envs=1),
        run=RunConfig(total_steps=20_000),
        replay=ReplayConfig(buffer_size=200_000, learning_starts=10_000),
        gamma=0.98,
    )


def ddpg_pendulum() -> TD3Config:
    """Pendulum-v1 by DDPG (Lillicrap et al. 2016): TD3 with one critic, no delay and no target noise."""
    return ddpg(td3_pendulum())


def tqc_pendulum() -> TQCConfig:
    """Pendulum-v1 by TQC with RL-Zoo's hyper-parameters, 20,000 steps."""
    return TQCConfig(env=EnvConfig(id="Pendulum-v1", num_envs=1), run=RunConfig(total_steps=20_000), learning_rate=1e-3)


def bc_npz() -> BCConfig:
    """Behaviour cloning from a data set: --dataset FILE.npz or a Minari id, --env.id of its environment."""
    return BCConfig()


def iql_npz() -> IQLConfig:
    """Implicit Q-learning from a data set: --dataset FILE.npz or a Minari id, --env.id of its environment."""
    return IQLConfig()


def distill_policy() -> PolicyDistillConfig:
    """Distillation of a control policy into a smaller one: --teacher RUN, --env.id of its environment."""
    return PolicyDistillConfig()
