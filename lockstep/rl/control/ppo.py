"""Proximal policy optimisation (Schulman et al. 2017) with generalised advantage estimation (Schulman et al. 2016).

Discrete, multi-discrete and continuous actions, action masks, images, dictionaries and recurrent policies.

Legend: T steps, N environments, B minibatch rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, Space
from lockstep.core.tree import tree_map
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.actor import Actor, as_tensor
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.gradients import PPOGradients, RowBatch, SequenceBatch
from lockstep.rl.optimiser import make_optimiser
from lockstep.rl.permutation import minibatches
from lockstep.rl.rollout import Collector, RewardScaler, Rollout
from lockstep.rl.schedules import linear
from lockstep.rl.session import Result, RunConfig, Session


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation."""

    env: EnvConfig = field(default_factory=EnvConfig)
    """Environment and number of copies."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Policy network."""
    run: RunConfig = field(default_factory=RunConfig)
    """Length, seed, evaluation, checkpoints."""
    num_steps: int = 32
    """Steps of each environment per update."""
    num_epochs: int = 20
    """Passes over each rollout."""
    minibatch_size: int = 256
    """Transitions per gradient step (recurrent: rounded to whole environments)."""
    learning_rate: float = 1e-3
    """Adam step size at the start."""
    learning_rate_end: float | None = None
    """Adam step size at the end, reached linearly (None: constant)."""
    adam_eps: float = 1e-5
    """Adam epsilon."""
    gamma: float = 0.99
    """Discount per step."""
    gae_lambda: float = 0.95
    """GAE decay."""
    clip: float = 0.2
    """Ratio clip at the start."""
    clip_end: float | None = None
    """Ratio clip at the end, reached linearly (None: constant)."""
    value_clip: float | None = None
    """Clip of the value's change (None: none)."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus at the start."""
    entropy_coef_end: float | None = None
    """Weight of the entropy bonus at the end, reached linearly (None: constant)."""
    max_grad_norm: float = 0.5
    """Clip of the gradient's global norm."""
    normalise_advantage: bool = True
    """Per minibatch: zero mean, unit deviation."""
    target_kl: float | None = None
    """Stop the epochs of an update once the mean KL of a minibatch exceeds 1.5 of this (None: never)."""
    normalise_obs: bool = False
    """Running normalisation of observations, part of the policy."""
    normalise_reward: bool = False
    """Scale rewards by the deviation of the discounted return (training only)."""
    frame_stack: int = 1
    """Frames joined by the policy."""
    log_std_init: float = 0.0
    """Initial log standard deviation of continuous actions."""

    def policy_spec(self, obs_space: Space, action_space: Space) -> PolicySpec:
        """The policy that this configuration trains on those spaces."""
        return PolicySpec(
            obs_space=obs_space,
            action_space=action_space,
            head="gaussian" if isinstance(action_space, BoxSpace) else "categorical",
            network=self.network,
            normalise_obs=self.normalise_obs,
            frame_stack=self.frame_stack,
            log_std_init=self.log_std_init,
        )


def train(config: PPOConfig, session: Session) -> Result:
    """Collect T steps of N environments, then pass over them `num_epochs` times in minibatches; repeat."""
    _check(config)
    kernels.set_num_threads(config.run.threads)
    env = make_env(config.env, seed=session.seed)
    policy = Policy(config.policy_spec(env.obs_space, env.action_space), seed=session.seed)
    actor = Actor(policy, env.num_envs, seed=session.seed)
    optimiser = make_optimiser(policy, config.learning_rate, eps=config.adam_eps)
    gradients = PPOGradients(policy)
    scaler = RewardScaler(env.num_envs, config.gamma)
    rollout = Rollout(config.num_steps, env.num_envs)
    collector = Collector(env, actor, keep_obs=config.normalise_obs)
    collector.begin(session.seed)
    session.begin(policy, {"collector": collector, "optimiser": optimiser, "scaler": scaler})
    while session.running:
        optimiser.lr = _schedule(config.learning_rate, config.learning_rate_end, session)
        clip = _schedule(config.clip, config.clip_end, session)
        entropy_coef = _schedule(config.entropy_coef, config.entropy_coef_end, session)
        episodes = collector.collect(rollout)
        reward = scaler(rollout) if config.normalise_reward else rollout.reward
        advantage = kernels.gae(
            reward,
            rollout.value,
            rollout.next_value,
            rollout.terminated,
            rollout.ended,
            rollout.valid,
            config.gamma,
            config.gae_lambda,
        )
        batches = _sequences if policy.is_recurrent else _rows
        metrics: dict[str, Tensor] = {}
        for batch in batches(config, rollout, advantage, session):
            metrics = gradients(
                batch,
                clip=clip,
                value_clip=config.value_clip,
                value_coef=config.value_coef,
                entropy_coef=entropy_coef,
                normalise_advantage=config.normalise_advantage,
            )
            if config.target_kl is not None and float(metrics["approx_kl"]) > 1.5 * config.target_kl:
                break
            optimiser.step(max_grad_norm=config.max_grad_norm)
        for obs in rollout.obs:
            policy.preprocess.update(tree_map(as_tensor, obs))
        session.advance(rollout.num_valid, {**metrics, "learning_rate": optimiser.lr}, episodes)
    env.close()
    return session.finish()


def _rows(config: PPOConfig, rollout: Rollout, advantage_TN: Tensor, session: Session) -> Iterator[RowBatch]:
    """Minibatches of independent transitions."""
    rows = kernels.RolloutRows(
        features=tree_map(lambda x: x.flatten(0, 1), rollout.features),
        action=rollout.action.flatten(0, 1),  # type: ignore[union-attr]
        logprob=rollout.logprob.flatten(),
        advantage=advantage_TN.flatten(),
        value=rollout.value.flatten(),
    )
    valid = None if bool(rollout.valid.all()) else rollout.valid.flatten().nonzero().squeeze(1)
    num = len(rows.logprob) if valid is None else len(valid)
    for index in minibatches(num, config.minibatch_size, config.num_epochs, session.seed, session.updates):
        yield RowBatch(rows, index if valid is None else valid[index])


def _sequences(config: PPOConfig, rollout: Rollout, advantage_TN: Tensor, session: Session) -> Iterator[SequenceBatch]:
    """Minibatches of whole environments, so that the recurrent state runs through."""
    envs_per_batch = max(config.minibatch_size // rollout.num_steps, 1)
    seed, update = session.seed, session.updates
    for index in minibatches(rollout.num_envs, envs_per_batch, config.num_epochs, seed, update):
        valid = rollout.valid[:, index]
        yield SequenceBatch(
            features=tree_map(lambda x, index=index: x[:, index], rollout.features),
            action=rollout.action[:, index],  # type: ignore[index]
            logprob=rollout.logprob[:, index],
            advantage=advantage_TN[:, index],
            value=rollout.value[:, index],
            mask=None if bool(valid.all()) else valid,
            state={name: x[index] for name, x in rollout.initial_state.items()},
            starts=rollout.starts[:, index],
        )


def _schedule(start: float, end: float | None, session: Session) -> float:
    return start if end is None else linear(start, end, session.progress)


def _check(config: PPOConfig) -> None:
    for name in ("num_steps", "num_epochs", "minibatch_size"):
        value = config.__dict__[name]
        if value < 1:
            raise ConfigError(f"{name}={value}; expected at least 1")
    if not 0.0 < config.gamma <= 1.0:
        raise ConfigError(f"gamma={config.gamma}; expected 0 < gamma <= 1")
