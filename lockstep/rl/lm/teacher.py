"""A teacher beside the loop: on-policy distillation, of the student's own samples (GKD, Agarwal et al. 2024; MiniLLM, Gu et
al. 2024).

    roll out (the student) -> the teacher's distribution at every sampled token -> divergence -> step -> publish

Legend: R sampled tokens (rows) of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lockstep.core.errors import CheckpointError, ConfigError
from lockstep.learn.distill import micro_divergence
from lockstep.learn.learner import Learner
from lockstep.learn.logprobs import Logprobs
from lockstep.learn.model import ModelConfig, Teacher, TrainedModel, build, load_teacher
from lockstep.learn.packing import Example, MicroBatch
from lockstep.models.digest import weights_digest
from lockstep.rl.lm.algorithms import PolicyLossConfig, TeacherLossConfig
from lockstep.rl.lm.losses import DivergenceOf
from lockstep.rl.lm.problems import ProblemSource
from lockstep.rl.lm.rollout import PromptEncoder
from lockstep.rl.lm.start import reference_example


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A model that the student learns from; what is learned of it, `learn.loss.teacher` says."""

    path: str = ""
    """Model folder, run directory, GGUF file or hub id (empty: none)."""
    dtype: str = "auto"
    """Precision of the teacher: auto, fp32, bf16, int8 or int4."""
    references: int = 0
    """Further problems of an update, of which the task's reference answer is learned in the place of samples: GKD's share of
    data, counted in problems."""

    def check(self, loss: PolicyLossConfig) -> None:
        """Refuse a teacher that teaches nothing, and a lesson without a teacher.

        Raises:
            ConfigError: names both settings.
        """
        coef = loss.teacher.coef
        if bool(self.path) != (coef > 0.0):
            raise ConfigError(
                f"teacher.path={self.path!r} with learn.loss.teacher.coef={coef}; "
                + (
                    "give coef above 0, or no teacher"
                    if self.path
                    else "give a model folder, run directory or GGUF file"
                )
            )
        if self.references < 0 or (self.references and not self.path):
            raise ConfigError(f"teacher.references={self.references}; expected 0 or more, and above 0 a teacher.path")
        if self.references and loss.advantage == "gae":
            raise ConfigError(
                f"teacher.references={self.references} with advantage='gae'; expected 0: they have no values"
            )

    def open(self) -> OnlineTeacher | None:
        """The teacher; None where there is none.

        Raises:
            InputError, FormatError: it cannot be read.
        """
        return OnlineTeacher(load_teacher(self.path, self.dtype)) if self.path else None


class OnlineTeacher:
    """A teacher as the loop asks it, and as a checkpoint knows it: by its digest."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.digest = weights_digest(teacher.model)

    def divergence(self, learner: Learner, wish: TeacherLossConfig) -> DivergenceOf:
        """D(teacher, student) [R] of a micro-batch, differentiable in the student."""
        student, teacher = learner.model, self.teacher.model

        def of_rows(logprobs: Logprobs, micro: MicroBatch) -> Tensor:
            return micro_divergence(
                student, teacher, logprobs, micro, wish.divergence, temperature=wish.temperature, beta=wish.beta
            )

        return of_rows

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore, but the teacher must be the run's.

        Raises:
            CheckpointError: it is another one.
        """
        if state["digest"] != self.digest:
            raise CheckpointError(
                f"the teacher {self.teacher.path} has digest {self.digest[:16]}, the run began with "
                f"{state['digest'][:16]}; put the run's teacher back"
            )


def reference_examples(made: TrainedModel, source: ProblemSource, step: int, num: int) -> list[Example]:
    """Reference answers of an update, of problems from beyond the groups' numbers: a function of the step. One that the model
    has not the positions for is left out.

    Raises:
        ConfigError: a problem without a reference answer.
    """
    prompts = PromptEncoder(made.tokenizer)
    numbers = range((1 << 30) + step * num, (1 << 30) + (step + 1) * num)
    found = [reference_example(made.tokenizer, prompts, source.training(number)) for number in numbers]
    return [example for example in found if len(example.tokens) <= made.model.max_context]


def build_student(
    config: ModelConfig, texts: Iterable[str], seed: int, folder: Path | None, teacher: OnlineTeacher | None
) -> TrainedModel:
    """`build`; a new student of a teacher has its tokenizer and its vocabulary.

    Raises:
        ConfigError: as `build`; the two do not mean the same by their tokens.
    """
    if teacher is None:
        return build(config, texts, seed, folder)
    taught = teacher.teacher
    made = build(config, texts, seed, taught.folder_for(config), taught.model.vocab_size)
    taught.check(made)
    return made
