"""Policy distillation: a student learns to do what a teacher does, on the states that both of them reach (Rusu et al. 2015;
Czarnecki et al. 2019, who show that the student's own states matter; Ross et al. 2011, DAgger).

Legend: T steps, N environments, B minibatch rows, P distribution parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.tree import tree_map
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.envs.control.stepper import EpisodeEnd, Stepper
from lockstep.models.control.actor import Actor, as_tensor
from lockstep.models.control.folder import load_policy
from lockstep.models.control.heads import Gaussian, QValues, masked
from lockstep.models.control.policy import Policy
from lockstep.models.control.preprocess import ACTION_MASK
from lockstep.models.control.spec import NetworkConfig
from lockstep.rl.losses import distillation_loss
from lockstep.rl.optimiser import make_optimiser
from lockstep.rl.permutation import minibatches
from lockstep.rl.rollout import restore_env
from lockstep.rl.session import Result, RunConfig, Session


@dataclass(frozen=True, kw_only=True)
class PolicyDistillConfig:
    """Distillation of a control policy into another one, usually smaller."""

    teacher: str = ""
    """Run directory or policy folder of the policy to imitate."""
    student: str = ""
    """Policy folder to begin from, e.g. a pruned one (empty: a new policy with `network`)."""
    keep_zeros: bool = False
    """Weights of the student that are zero stay zero."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Environment whose states are learned from; evaluations run on it."""
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(hidden_sizes=(16, 16)))
    """Network of a new student."""
    run: RunConfig = field(default_factory=lambda: RunConfig(total_steps=50_000))
    """Length, seed, evaluation, checkpoints."""
    teacher_share: float = 0.5
    """Fraction of the environments in which the teacher acts; in the others the student does."""
    num_steps: int = 128
    """Steps of each environment per update."""
    num_epochs: int = 8
    """Passes over these steps."""
    minibatch_size: int = 128
    """Rows of a gradient step."""
    learning_rate: float = 1e-3
    """Adam step size."""
    temperature: float = 0.01
    """Divides action values before their softmax (heads of action values only)."""
    value_coef: float = 0.5
    """Weight of the squared error of the state's value, relative to its spread (policies with a critic)."""
    max_grad_norm: float = 0.5
    """Clip of the gradient's global norm."""


class Lessons:
    """Steps the environments and records what the student sees and the teacher would do."""

    def __init__(self, config: PolicyDistillConfig, env: Stepper, teacher: Policy, student: Policy, seed: int) -> None:
        self.config, self.env, self.teacher = config, env, teacher
        self.pupil = Actor(student, env.num_envs, seed=seed)
        self.num_taught = round(config.teacher_share * env.num_envs)
        self.seed = seed
        self.state = teacher.initial_state(env.num_envs)
        self.obs: Any = None

    @torch.no_grad()
    def collect(self) -> tuple[Any, Tensor, Tensor | None, Tensor, list[EpisodeEnd]]:
        """(student's features, teacher's parameters [M, P], teacher's values [M], valid [M], episodes), M = T * N."""
        features, params, values, valid, episodes = [], [], [], [], []
        for _ in range(self.config.num_steps):
            pupil, teacher = self.pupil, self.teacher
            obs = tree_map(as_tensor, self.obs)
            seen, self.state = teacher.encode(obs, self.state, pupil.starts)
            params_NP, value_N, self.state = teacher(seen, self.state, pupil.starts)
            noise = teacher.noise(self.seed + 1, pupil.streams, pupil.positions)
            taught = teacher.action_map(teacher.head.sample(params_NP, noise, mask_of(seen))[0])
            step = pupil.act(self.obs)
            features.append(tree_map(torch.clone, step.features))
            params.append(choices_of(teacher, params_NP, seen))
            values.append(value_N)
            action = step.env_action.clone()
            action[: self.num_taught] = taught[: self.num_taught]
            result = self.env.step(action.numpy())
            valid.append(torch.from_numpy(result.valid_N.copy()))
            pupil.advance(result.starts_N, result.valid_N)
            self.obs = result.obs
            episodes += result.episodes
        joined = tree_map(lambda *parts: torch.cat(parts), *features)
        value = None if values[0] is None else torch.cat(values)
        return joined, torch.cat(params), value, torch.cat(valid), episodes

    def state_dict(self) -> dict[str, Any]:
        """Environments, the student's actor, the teacher's state."""
        return {"env": self.env.state_dict(), "actor": self.pupil.state_dict(), "teacher": dict(self.state)}

    def load_state_dict(self, data: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        restore_env(self.env, data["env"])
        self.pupil.load_state_dict(data["actor"])
        self.state = dict(data["teacher"])
        self.obs = self.env.obs
        self.pupil.starts.numpy()[:] = self.env.starts_N


def train(config: PolicyDistillConfig, session: Session) -> Result:
    """Both act; the student's distribution moves to the teacher's on what they saw; repeat."""
    if not 0.0 <= config.teacher_share <= 1.0 or min(config.num_steps, config.num_epochs, config.minibatch_size) < 1:
        raise ConfigError("teacher_share lies in 0..1, and num_steps, num_epochs and minibatch_size are at least 1")
    kernels.set_num_threads(config.run.threads)
    env = make_env(config.env, seed=session.seed)
    teacher = read_teacher(config, env)
    student = new_student(config, teacher, session.seed)
    zeros = [(p, p.data == 0) for p in student.parameters() if config.keep_zeros and p.ndim > 1]
    optimiser = make_optimiser(student, config.learning_rate)
    lessons = Lessons(config, env, teacher, student, session.seed)
    lessons.obs = env.reset(session.seed)
    session.begin(student, {"lessons": lessons, "optimiser": optimiser})
    while session.running:
        features, wanted_MP, value_M, valid_M, episodes = lessons.collect()
        spread = 1.0 if value_M is None else float(value_M.std()) + 1e-8
        rows = valid_M.nonzero().squeeze(1)
        for index in minibatches(len(rows), config.minibatch_size, config.num_epochs, session.seed, session.updates):
            batch = rows[index]
            seen = tree_map(lambda x, batch=batch: x[batch], features)
            params_BP, value_B, _ = student(seen, {}, torch.zeros(len(batch), dtype=torch.bool))
            loss, metrics = distillation_loss(
                student.head,
                choices_of(student, params_BP, seen),
                wanted_MP[batch],
                log_stds(student, teacher),
                temperature=config.temperature,
            )
            if value_B is not None and value_M is not None:
                loss = loss + config.value_coef * ((value_B - value_M[batch]) / spread).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step(max_grad_norm=config.max_grad_norm)
            for parameter, where in zeros:
                parameter.data[where] = 0.0
        session.advance(len(rows), metrics, episodes)
    env.close()
    return session.finish()


def read_teacher(config: PolicyDistillConfig, env: Stepper) -> Policy:
    """The teacher, if it can act there.

    Raises:
        ConfigError: none is given, or its spaces are others.
    """
    if not config.teacher:
        raise ConfigError("teacher is empty; give the run directory or policy folder to imitate, --teacher RUN")
    teacher = load_policy(Path(config.teacher))
    spec = teacher.spec
    if (spec.obs_space, spec.action_space) != (env.obs_space, env.action_space):
        raise ConfigError(
            f"the teacher observes {spec.obs_space} and does {spec.action_space}; {config.env.id} has {env.obs_space} and "
            f"{env.action_space}; give --env.id of its own environment"
        )
    return teacher.eval().requires_grad_(False)


def new_student(config: PolicyDistillConfig, teacher: Policy, seed: int) -> Policy:
    """The policy to train: the one given, or a new one with the teacher's spaces, head and preprocessing.

    Raises:
        ConfigError: it would be recurrent, or does not fit the teacher.
    """
    if config.student:
        student = load_policy(Path(config.student))
        mine, other = student.spec, teacher.spec
        if (mine.obs_space, mine.action_space, mine.head) != (other.obs_space, other.action_space, other.head):
            raise ConfigError(f"the student {config.student} has other spaces or another head than the teacher")
    else:
        spec = replace(teacher.spec, network=config.network, imported=None, dueling=False, noisy=False)
        student = Policy(replace(spec, num_atoms=1, support=None), seed=seed)
        student.preprocess.load_state_dict(teacher.preprocess.state_dict())
        if isinstance(student.head, Gaussian):
            student.head.load_state_dict(teacher.head.state_dict())
    if student.is_recurrent:
        raise ConfigError(
            "a recurrent student is not trained by distillation; take network.recurrent none (its teacher may be "
            "recurrent; --frame-stack policies keep their frames)"
        )
    return student


def mask_of(features: Any) -> Tensor | None:
    """The action mask in network input, if there is one."""
    return features[ACTION_MASK] if isinstance(features, dict) and ACTION_MASK in features else None


def choices_of(policy: Policy, params_NP: Tensor, features: Any) -> Tensor:
    """Parameters that two policies of one head can be compared by: logits or action values with masked choices, or as is."""
    if isinstance(policy.head, QValues):
        params_NP = policy.head.values(params_NP)
    return masked(params_NP, mask_of(features))


def log_stds(student: Policy, teacher: Policy) -> tuple[Tensor, Tensor]:
    """Log standard deviations that are parameters of their own; empty for other heads."""
    if isinstance(student.head, Gaussian) and isinstance(teacher.head, Gaussian):
        return student.head.log_std, teacher.head.log_std
    return torch.empty(0), torch.empty(0)
