"""Policy distillation: the loss is the divergence, the student comes to do what the teacher does, a resumed run is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, DiscreteSpace
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control import heads
from lockstep.models.control.folder import load_policy, save_policy
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.control.distill import PolicyDistillConfig, train
from lockstep.rl.losses import distillation_loss
from lockstep.rl.session import RunConfig, Session
from lockstep.runs.directory import RunDirectory


def test_loss_is_the_divergence_of_the_distributions() -> None:
    def loss(head: heads.Head, a: Tensor, b: Tensor, stds: Any = None) -> Tensor:
        return distillation_loss(head, a, b, stds or (a[0], b[0]), temperature=0.5)[0]

    a, b = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 28).view(7, 4)
    want = kl_divergence(Categorical(logits=b), Categorical(logits=a)).mean()
    torch.testing.assert_close(loss(heads.Categorical(4), a, b), want)
    want = kl_divergence(Categorical(logits=b / 0.5), Categorical(logits=a / 0.5)).mean()
    torch.testing.assert_close(loss(heads.QValues(4), a, b), want)
    parts = [kl_divergence(Categorical(logits=b[:, c]), Categorical(logits=a[:, c])) for c in ([0], [1, 2, 3])]
    torch.testing.assert_close(loss(heads.MultiCategorical((1, 3)), a, b), sum(parts).mean())
    stds = torch.tensor([0.1, -0.5, 0.3, 0.0]), torch.tensor([-0.2, 0.4, 0.0, 0.0])
    normals = [Independent(Normal(mean, log_std.exp()), 1) for mean, log_std in zip((a, b), stds, strict=True)]
    torch.testing.assert_close(loss(heads.Gaussian(4), a, b, stds), kl_divergence(normals[1], normals[0]).mean())
    normals = [Independent(Normal(x[:, :2], x[:, 2:].exp()), 1) for x in (a, b)]
    torch.testing.assert_close(loss(heads.SquashedGaussian(2), a, b), kl_divergence(normals[1], normals[0]).mean())
    torch.testing.assert_close(loss(heads.Deterministic(4), a, b), (a - b).square().sum(1).mean())


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A decided policy, by chance not a good one."""
    env = make_env(EnvConfig(num_envs=1), seed=0)
    env.close()
    spec = PolicySpec(obs_space=env.obs_space, action_space=env.action_space, head="categorical")
    policy = Policy(spec, seed=4)
    policy.actor.weights[-1].data *= 300
    save_policy(policy, tmp_path / "teacher")
    return tmp_path / "teacher"


def config_of(teacher: Path, **changes: Any) -> PolicyDistillConfig:
    run = RunConfig(total_steps=2048, final_episodes=0, log_every=1, tensorboard=False, checkpoint_every=512)
    return replace(PolicyDistillConfig(teacher=str(teacher), run=run, num_steps=64), **changes)


def disagreement(policy: Policy, teacher: Path) -> float:
    """Share of states in which the best actions differ."""
    obs = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    acts = [p.act(obs, {}, torch.zeros(500, dtype=torch.bool), torch.zeros(500, 2), deterministic=True).action
            for p in (policy, load_policy(teacher))]  # fmt: skip
    return float((acts[0] != acts[1]).float().mean())


def test_student_learns_the_teacher(teacher: Path) -> None:
    config = config_of(teacher, learning_rate=5e-3, num_epochs=20)
    policy = train(config, Session(config.run, config.env)).policy
    assert policy is not None
    assert policy.spec.network.hidden_sizes == (16, 16)
    start = Policy(policy.spec, seed=1)
    assert disagreement(start, teacher) > 0.3
    assert disagreement(policy, teacher) < 0.1


def test_a_pruned_student_keeps_its_zeros(teacher: Path, tmp_path: Path) -> None:
    student = load_policy(teacher)
    where = torch.rand_like(student.actor.weights[1], generator=torch.Generator().manual_seed(0)) < 0.5
    student.actor.weights[1].data[where] = 0.0
    save_policy(student, tmp_path / "student")
    config = config_of(teacher, student=str(tmp_path / "student"), keep_zeros=True, num_steps=16)
    config = replace(config, run=replace(config.run, total_steps=128))
    policy = train(config, Session(config.run, EnvConfig())).policy
    assert policy is not None
    assert bool((policy.actor.weights[1][where] == 0).all())
    assert not torch.equal(policy.actor.weights[1], student.actor.weights[1])


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(teacher: Path, tmp_path: Path) -> None:
    config = config_of(teacher)
    whole = train(config, Session(config.run, config.env)).policy

    class Stop(Exception):
        pass

    def stop(step: int, total: int, metrics: Any) -> None:
        if step >= 1536:
            raise Stop

    directory = RunDirectory.create(tmp_path, "run", config, 1, recipe="distill-policy", kernels="")
    session = Session(config.run, config.env, directory=directory, on_progress=stop)
    with pytest.raises(Stop), directory:
        train(config, session)
    assert session.sink is not None
    session.sink.close()
    directory = RunDirectory.open(directory.path)
    with directory:
        resumed = train(config, Session(config.run, config.env, directory=directory, resume=True)).policy
    assert whole is not None
    assert resumed is not None
    assert resumed.digest() == whole.digest()


def test_what_cannot_be_distilled_says_so(teacher: Path, tmp_path: Path) -> None:
    spec = PolicySpec(obs_space=BoxSpace((3,), "float32"), action_space=DiscreteSpace(2), head="categorical")
    save_policy(Policy(spec), tmp_path / "other")
    cases = {
        "teacher is empty": replace(config_of(teacher), teacher=""),
        "the teacher observes": config_of(tmp_path / "other"),
        "other spaces or another head": config_of(teacher, student=str(tmp_path / "other")),
        "recurrent student": config_of(teacher, network=NetworkConfig(recurrent="gru")),
        "teacher_share lies in": config_of(teacher, teacher_share=2.0),
    }
    for word, config in cases.items():
        with pytest.raises(ConfigError, match=word):
            train(config, Session(config.run, config.env))
