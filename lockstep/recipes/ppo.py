"""PPO recipes. Those named as RL-Zoo's take its tuned hyper-parameters (Raffin 2020, github.com/DLR-RM/rl-baselines3-zoo)."""

from __future__ import annotations

from dataclasses import replace

from lockstep.envs.control.config import EnvConfig
from lockstep.models.control.spec import NetworkConfig
from lockstep.rl.control.ppo import PPOConfig
from lockstep.rl.session import RunConfig


def cartpole() -> PPOConfig:
    """CartPole-v1 by PPO until an evaluation reaches 490, in about a second of training."""
    return PPOConfig(
        env=EnvConfig(id="CartPole-v1", num_envs=8),
        run=RunConfig(total_steps=100_000, eval_every=2048, stop_at_return=490.0, log_every=256),
        num_steps=32,
        num_epochs=20,
        minibatch_size=256,
        learning_rate=1e-3,
        gamma=0.98,
        gae_lambda=0.8,
    )


def cartpole_zoo() -> PPOConfig:
    """CartPole-v1 by PPO with RL-Zoo's hyper-parameters, 100,000 steps."""
    return replace(cartpole(), run=RunConfig(total_steps=100_000), learning_rate_end=0.0, clip_end=0.0)


def acrobot() -> PPOConfig:
    """Acrobot-v1 by PPO with RL-Zoo's hyper-parameters."""
    return PPOConfig(
        env=EnvConfig(id="Acrobot-v1", num_envs=16),
        run=RunConfig(total_steps=1_000_000),
        num_steps=256,
        num_epochs=4,
        minibatch_size=64,
        learning_rate=3e-4,
        gae_lambda=0.94,
        normalise_obs=True,
        normalise_reward=True,
    )


def pendulum() -> PPOConfig:
    """Pendulum-v1 by PPO with RL-Zoo's hyper-parameters (without gSDE)."""
    return PPOConfig(
        env=EnvConfig(id="Pendulum-v1", num_envs=4),
        run=RunConfig(total_steps=100_000),
        num_steps=1024,
        num_epochs=10,
        minibatch_size=64,
        learning_rate=1e-3,
        gamma=0.9,
    )


def lunarlander() -> PPOConfig:
    """LunarLander-v3 by PPO until an evaluation reaches 230, well inside a minute of training."""
    return PPOConfig(
        env=EnvConfig(id="LunarLander-v3", num_envs=16),
        run=RunConfig(total_steps=500_000, eval_every=16_384, eval_episodes=50, stop_at_return=230.0, log_every=4096),
        num_steps=256,
        num_epochs=10,
        minibatch_size=128,
        learning_rate=7e-4,
        learning_rate_end=0.0,
        gamma=0.999,
        gae_lambda=0.98,
        normalise_reward=True,
    )


def lunarlander_zoo() -> PPOConfig:
    """LunarLander-v3 by PPO with RL-Zoo's hyper-parameters, 1M steps."""
    return PPOConfig(
        env=EnvConfig(id="LunarLander-v3", num_envs=16),
        run=RunConfig(total_steps=1_000_000),
        num_steps=1024,
        num_epochs=4,
        minibatch_size=64,
        learning_rate=3e-4,
        gamma=0.999,
        gae_lambda=0.98,
        entropy_coef=0.01,
    )


def lunarlander_continuous() -> PPOConfig:
    """LunarLander-v3 with continuous thrust, by PPO with RL-Zoo's hyper-parameters."""
    return replace(lunarlander_zoo(), env=EnvConfig(id="LunarLander-v3", num_envs=16, kwargs={"continuous": True}))


def _mujoco(env_id: str, num_envs: int = 1) -> PPOConfig:
    """The hyper-parameters of CleanRL's continuous-action PPO (Huang et al. 2022), normalisation inside the policy."""
    return PPOConfig(
        env=EnvConfig(id=env_id, num_envs=num_envs),
        run=RunConfig(total_steps=1_000_000),
        num_steps=2048 // num_envs,
        num_epochs=10,
        minibatch_size=64,
        learning_rate=3e-4,
        learning_rate_end=0.0,
        normalise_obs=True,
        normalise_reward=True,
    )


def halfcheetah() -> PPOConfig:
    """HalfCheetah-v5 by PPO with CleanRL's hyper-parameters, 1M steps."""
    return _mujoco("HalfCheetah-v5")


def hopper() -> PPOConfig:
    """Hopper-v5 by PPO with CleanRL's hyper-parameters, 1M steps."""
    return _mujoco("Hopper-v5")


def walker2d() -> PPOConfig:
    """Walker2d-v5 by PPO with CleanRL's hyper-parameters, 1M steps."""
    return _mujoco("Walker2d-v5")


def halfcheetah_zoo() -> PPOConfig:
    """HalfCheetah-v5 by PPO with RL-Zoo's tuned hyper-parameters, 1M steps."""
    return PPOConfig(
        env=EnvConfig(id="HalfCheetah-v5", num_envs=1),
        network=NetworkConfig(hidden_sizes=(256, 256), activation="relu", init="uniform"),
        run=RunConfig(total_steps=1_000_000),
        num_steps=512,
        num_epochs=20,
        minibatch_size=64,
        learning_rate=2.0633e-5,
        gamma=0.98,
        gae_lambda=0.92,
        clip=0.1,
        value_coef=0.58096,
        entropy_coef=0.000401762,
        max_grad_norm=0.8,
        normalise_obs=True,
        normalise_reward=True,
        log_std_init=-2.0,
    )


def hopper_zoo() -> PPOConfig:
    """Hopper-v5 by PPO with RL-Zoo's tuned hyper-parameters, 1M steps."""
    return replace(
        halfcheetah_zoo(),
        env=EnvConfig(id="Hopper-v5", num_envs=1),
        num_epochs=5,
        minibatch_size=32,
        learning_rate=9.80828e-5,
        gamma=0.999,
        gae_lambda=0.99,
        clip=0.2,
        value_coef=0.835671,
        entropy_coef=0.00229519,
        max_grad_norm=0.7,
    )


def minigrid() -> PPOConfig:
    """MiniGrid-Empty-5x5-v0 by PPO: dictionary observations, image and direction."""
    return PPOConfig(
        env=EnvConfig(id="MiniGrid-Empty-5x5-v0", num_envs=8),
        network=NetworkConfig(hidden_sizes=(64,), encoder_size=64),
        run=RunConfig(total_steps=50_000),
        num_steps=128,
        num_epochs=4,
        minibatch_size=128,
        learning_rate=1e-3,
        entropy_coef=0.01,
    )


def minigrid_memory() -> PPOConfig:
    """MiniGrid-MemoryS7-v0 by PPO with an LSTM: the cue must be remembered."""
    base = minigrid()
    return replace(
        base,
        env=EnvConfig(id="MiniGrid-MemoryS7-v0", num_envs=16),
        network=replace(base.network, recurrent="lstm", recurrent_size=64),
        run=RunConfig(total_steps=500_000),
        minibatch_size=512,
    )


def minatar_breakout() -> PPOConfig:
    """MinAtar/Breakout-v1 by PPO with a small convolutional network."""
    return PPOConfig(
        env=EnvConfig(id="MinAtar/Breakout-v1", num_envs=32),
        network=NetworkConfig(hidden_sizes=(), activation="relu", encoder="small_cnn", encoder_size=128),
        run=RunConfig(total_steps=1_000_000),
        num_steps=64,
        num_epochs=4,
        minibatch_size=256,
        learning_rate=1e-3,
        learning_rate_end=0.0,
        entropy_coef=0.01,
    )


def pong() -> PPOConfig:
    """ALE/Pong-v5 by PPO with the Nature network and CleanRL's hyper-parameters, 10M steps."""
    return PPOConfig(
        env=EnvConfig(id="ALE/Pong-v5", num_envs=8, clip_reward=True),
        network=NetworkConfig(hidden_sizes=(), activation="relu", encoder="nature_cnn"),
        run=RunConfig(total_steps=10_000_000),
        num_steps=128,
        num_epochs=4,
        minibatch_size=256,
        learning_rate=2.5e-4,
        learning_rate_end=0.0,
        clip=0.1,
        entropy_coef=0.01,
        frame_stack=4,
    )
