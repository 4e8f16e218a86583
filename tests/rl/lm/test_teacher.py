"""On-policy distillation: the loop of reinforcement with a teacher's divergence in the advantage's stead."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.core.errors import CheckpointError, ConfigError
from lockstep.learn import distill
from lockstep.learn.learner import Learner, LearnerConfig
from lockstep.learn.losses import distribution_divergence
from lockstep.learn.model import ModelConfig, Teacher, build, load_teacher
from lockstep.learn.optimiser import OptimiserConfig
from lockstep.learn.packing import Example, micro_batches
from lockstep.models.families import build_model
from lockstep.rl.lm import grpo
from lockstep.rl.lm.algorithms import ALGORITHMS, PolicyLossConfig, TeacherLossConfig
from lockstep.rl.lm.losses import Counts, policy_loss
from lockstep.rl.lm.problems import ProblemSource, reading
from lockstep.rl.lm.start import StartConfig, supervised_start
from lockstep.rl.lm.teacher import OnlineTeacher
from lockstep.runs.directory import RunDirectory
from lockstep.runs.jsonl import read_jsonl
from lockstep.tokenize.training import train_tokenizer
from tests.learn.tiny import LLAMA, tiny
from tests.rl.lm.digits import AllDigits
from tests.rl.lm.small import config, folder, run, stopped, untimed
from tests.rl.lm.test_losses import batch

STUDENT = {
    "task__name": "tests.rl.lm.digits:AllDigits",
    "evaluation__problems": 10,
    "model__width": 32,
    "model__hidden": 32,
    "model__num_layers": 1,
    "model__num_heads": 1,
}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that says every digit it is asked for."""
    task, where = AllDigits(), tmp_path_factory.mktemp("teacher")
    source = ProblemSource(task, 1)
    sizes = ModelConfig(width=32, hidden=64, num_layers=2, num_heads=2, vocab_size=280, max_context=96)
    texts = (reading(source.training(number)) for number in range(50))
    made = build(sizes, texts, 1, where / "tokenizer")
    start = StartConfig(steps=90, batch=10, learner=LearnerConfig(optimiser=OptimiserConfig(lr=1e-2)))
    assert supervised_start(made.model, made.tokenizer, source, start) < 0.1
    made.write(where / "model", {}, "teacher")
    return where


def pupil(taught: Path, **changes: Any) -> grpo.GRPOConfig:
    return config("distill", **{"teacher__path": str(taught), **STUDENT, **changes})


def sampled(num: int, seed: int) -> list[Example]:
    """Samples as a pupil's are: no advantage."""
    return [
        dataclasses.replace(one, columns={**one.columns, "advantage": torch.zeros(len(one.tokens))})
        for one in batch(num, seed)
    ]


def online(seed: int = 99) -> OnlineTeacher:
    """A teacher of tokens alone."""
    made: Any = None
    return OnlineTeacher(Teacher(path="tiny", model=tiny(seed=seed), tokenizer=made, tokenizer_folder=None))


def composed(divergence: str) -> PolicyLossConfig:
    wish = TeacherLossConfig(coef=0.7, divergence=divergence, temperature=1.3, beta=0.3)  # type: ignore[arg-type]
    return dataclasses.replace(ALGORITHMS["distill"], teacher=wish)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_divergence_is_over_the_whole_vocabulary_at_every_sampled_token(kind: str) -> None:
    examples = sampled(6, seed=4)
    (micro,) = micro_batches(examples, 10_000)
    loss, teacher, counts = composed(kind), online(), Counts.of(examples)
    learner = Learner(tiny(), LearnerConfig())
    found = policy_loss(loss, counts, divergence=teacher.divergence(learner, loss.teacher))
    total, metrics = learner.accumulate([micro], found, temperature=0.9, entropy=True)
    gradients = {name: p.grad for name, p in learner.named_parameters().items()}

    plain = Learner(tiny(), LearnerConfig())
    student_RV, teacher_RV = (
        model.logits(model(micro.batch, None).index_select(0, micro.rows_R))
        for model in (plain.model, teacher.teacher.model)
    )
    whole_R = distribution_divergence(student_RV, teacher_RV, kind, temperature=1.3, beta=0.3)
    expected = 0.7 * (whole_R * micro.weight_R).sum() / counts.tokens
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["divergence"] == pytest.approx(expected.item() / 0.7, rel=1e-5)
    for name, p in plain.named_parameters().items():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


def test_logits_of_neither_are_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    (micro,) = micro_batches(batch(50, seed=7), 10_000)
    assert micro.num_rows > 3 * distill.ROWS
    teacher, learner, loss = online(), Learner(tiny(), LearnerConfig()), composed("jsd")
    seen: list[int] = []
    for model in (teacher.teacher.model, learner.model):
        before = model.logits
        monkeypatch.setattr(model, "logits", lambda x, f=before: (seen.append(len(x)), f(x))[1])
    divergence = teacher.divergence(learner, loss.teacher)
    learner.accumulate([micro], policy_loss(loss, Counts(1.0, 1), divergence=divergence), entropy=True)
    assert max(seen) == distill.ROWS
    assert len(seen) == 4 * -(-micro.num_rows // distill.ROWS)  # both models, forward and again backward


def test_a_student_samples_and_learns_exactly_and_its_teacher_is_scored(taught: Path, tmp_path: Path) -> None:
    wish = pupil(taught, teacher__references=2, learn__minibatches=2, run__total_steps=2)
    made = folder(tmp_path, wish)
    with made:
        result, _ = run(wish, made)
    assert result.first is not None
    assert result.first.extra["teacher"] == 1.0  # partial credit always: the digit itself
    lines = read_jsonl(made.metrics_path)
    assert [line["mismatch_max"] for line in lines] == [0.0] * 2
    assert all(line["divergence"] > 0 and line["grad_norm"] > 0 for line in lines)
    passport = json.loads((made.path / "passport.json").read_text())
    assert passport["digests"]["teacher"] == OnlineTeacher(load_teacher(str(taught))).digest
    assert json.loads((made.path / "model/config.json").read_text())["hidden_size"] == 32


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"staleness": 1, "learn__minibatches": 2, "rollout__top_p": 0.9},
        {"adapter__rank": 4, "learner__optimiser__lr": 0.02, "learn__loss__teacher__divergence": "jsd"},
        {"rollout__dtype": "int8", "learn__exact": False, "learn__loss__teacher__divergence": "forward_kl"},
    ],
    ids=["stale", "adapter", "int8 rollouts"],
)
def test_what_the_loop_can_a_student_can(taught: Path, changes: dict[str, Any]) -> None:
    _, found = run(pupil(taught, run__total_steps=2, **changes))
    assert [line["divergence"] > 0 for _, line in found] == [True] * 2


@pytest.mark.slow
def test_a_stopped_student_goes_on_as_if_it_had_not_and_with_no_other_teacher(taught: Path, tmp_path: Path) -> None:
    wish = pupil(taught, teacher__references=1)
    whole = folder(tmp_path / "whole", wish)
    with whole:
        run(wish, whole)
    parts = stopped(tmp_path / "parts", wish)
    other = build_model(json.loads((taught / "model/config.json").read_text()), 5)
    made = dataclasses.replace(build(ModelConfig(path=str(taught)), [], 1, None), model=other)
    made.write(tmp_path / "other" / "model", {}, "other")
    changed = pupil(tmp_path / "other", teacher__references=1)
    with pytest.raises(CheckpointError, match="put the run's teacher back"):
        run(changed, parts, resume=True)
    again = RunDirectory.open(parts.path)
    with again:
        run(wish, again, resume=True)
    lines = [[untimed(line) for line in read_jsonl(one.metrics_path)] for one in (again, whole)]
    assert lines[0] == lines[1]
    digests = [json.loads((one.path / "passport.json").read_text())["digests"]["last"] for one in (again, whole)]
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize(("divergence", "references"), [("reverse_kl", 0), ("forward_kl", 5)])
def test_a_student_from_nothing_learns_what_its_teacher_knows(taught: Path, divergence: str, references: int) -> None:
    """Never shown an answer (but for the mixture), never rewarded: only the teacher's distribution at its own tokens."""
    result, found = run(
        pupil(
            taught,
            start__steps=0,
            learn__loss__teacher__divergence=divergence,
            teacher__references=references,
            rollout__groups=10,
            learner__optimiser__lr=1e-2,
            run__total_steps=60,
            run__checkpoint_every=60,
        )
    )
    assert result.first is not None
    assert result.last is not None
    assert result.last.mean > 0.9 > 0.5 > result.first.mean
    divergences = [line["divergence"] for _, line in found]
    assert sum(divergences[-5:]) < 0.2 * sum(divergences[:5])


def test_wishes_that_cannot_be_met(taught: Path, tmp_path: Path) -> None:
    for changes, says in (
        ({"teacher__path": ""}, "give a model folder"),
        ({"teacher__references": -1}, "0 or more"),
    ):
        with pytest.raises(ConfigError, match=says):
            run(pupil(taught, **changes))
    with pytest.raises(ConfigError, match="no teacher"):
        run(config("dapo", teacher__path=str(taught)))
    with pytest.raises(ConfigError, match="learns nothing"):
        PolicyLossConfig(advantage="none")
    with pytest.raises(ConfigError, match="forward_kl, reverse_kl"):
        TeacherLossConfig(divergence="kl")  # type: ignore[arg-type]
    train_tokenizer(["other words, other words"] * 9, 280, tmp_path / "words")
    other = build(ModelConfig(width=32, hidden=32, num_layers=1, num_heads=1), [], 1, tmp_path / "words")
    other.write(tmp_path / "student", {}, "other words")
    with pytest.raises(ConfigError, match=r"token \d+ is .* to the student and .* to the teacher"):
        run(pupil(taught, model__path=str(tmp_path / "student")))


def test_models_of_other_padding_are_compared_by_the_tokens_that_both_have() -> None:
    (micro,) = micro_batches(batch(4, seed=2), 1000)
    teacher = OnlineTeacher(
        Teacher(path="", model=build_model({**LLAMA, "vocab_size": 160}, 3), tokenizer=None, tokenizer_folder=None)  # type: ignore[arg-type]
    )
    learner, loss = Learner(tiny(), LearnerConfig()), composed("forward_kl")
    divergence = teacher.divergence(learner, loss.teacher)
    total, _ = learner.accumulate([micro], policy_loss(loss, Counts(1.0, 1), divergence=divergence))
    assert total > 0.0
