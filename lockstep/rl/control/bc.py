"""Behaviour cloning: maximum likelihood of recorded actions (Pomerleau 1991).

Legend: B batch rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lockstep import kernels
from lockstep.core.spaces import BoxSpace, Space
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.dataset import OfflineData, load_transitions
from lockstep.rl.losses import cloning_loss
from lockstep.rl.optimiser import make_optimiser
from lockstep.rl.session import Result, RunConfig, Session


@dataclass(frozen=True, kw_only=True)
class BCConfig:
    """Behaviour cloning."""

    dataset: str = ""
    """Path of an .npz file (observations, actions, rewards, terminals, timeouts) or a Minari data set id."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Environment that the data comes from; evaluations run on it."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Policy network."""
    run: RunConfig = field(default_factory=lambda: RunConfig(total_steps=5_000))
    """Length (one step is one gradient step), seed, evaluation, checkpoints."""
    batch_size: int = 256
    """Transitions of a gradient step."""
    learning_rate: float = 1e-3
    """Adam step size."""
    entropy_coef: float = 1e-3
    """Weight of the entropy bonus."""
    normalise_obs: bool = False
    """Normalise observations by the data's mean and deviation, part of the policy."""

    def policy_spec(self, obs_space: Space, action_space: Space) -> PolicySpec:
        """The policy that this configuration trains on those spaces."""
        return PolicySpec(
            obs_space=obs_space,
            action_space=action_space,
            head="gaussian" if isinstance(action_space, BoxSpace) else "categorical",
            network=self.network,
            critic=False,
            normalise_obs=self.normalise_obs,
        )


def train(config: BCConfig, session: Session) -> Result:
    """Raise the likelihood of the data's actions, batch by batch."""
    kernels.set_num_threads(config.run.threads)
    env = make_env(config.env, seed=session.seed)
    obs_space, action_space = env.obs_space, env.action_space
    env.close()
    policy = Policy(config.policy_spec(obs_space, action_space), seed=session.seed)
    transitions = load_transitions(config.dataset, obs_space, action_space)
    data = OfflineData(transitions, policy, gamma=1.0, seed=session.seed)
    optimiser = make_optimiser(policy, config.learning_rate)
    session.begin(policy, {"optimiser": optimiser})
    while session.running:
        batch = data.sample(config.batch_size, session.step)
        logprob_B, entropy_B, _ = policy.evaluate(batch.features, batch.action)
        loss, metrics = cloning_loss(logprob_B, entropy_B, entropy_coef=config.entropy_coef)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        session.advance(1, metrics, [])
    return session.finish()
