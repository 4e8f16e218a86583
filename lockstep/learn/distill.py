"""Distillation: a student learns a teacher's distribution over the whole vocabulary at every token of given answers.

Off-policy, as here, the answers come from a file; on-policy they are the student's own samples, `rl.lm.teacher`, where the
same `micro_divergence` is GKD's (Agarwal et al. 2024).

Legend: R tokens (rows), r rows of a chunk, E model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.learn.adapter import AdapterConfig, frozen_parts, write_weights
from lockstep.learn.ahead import check_rows
from lockstep.learn.data import DataConfig, JsonLines, Renderer, shuffled, texts_of
from lockstep.learn.learner import Learner, LearnerConfig, Loss, Metrics, evaluated, written
from lockstep.learn.logprobs import ROWS, Logprobs
from lockstep.learn.losses import Divergence, distribution_divergence
from lockstep.learn.model import ModelConfig, build, load_teacher
from lockstep.learn.packing import MicroBatch, micro_batches
from lockstep.learn.session import Result, Session, UpdatesConfig
from lockstep.learn.sft import likelihoods, read_examples, supervised_rows
from lockstep.models.language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation of a teacher into a smaller model of the same vocabulary."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The student; a new one takes the teacher's tokenizer."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapter that is trained in its stead."""
    teacher: str = ""
    """Model folder, run directory, GGUF file or hub id of the teacher."""
    teacher_dtype: str = "auto"
    """Precision of the teacher: auto, fp32, bf16, int8 or int4."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows with "messages", "prompt" and "completion", or "text"."""
    held_out: str = ""
    """JSON-lines file of rows to evaluate on, by the student's likelihood (empty: none)."""
    divergence: Divergence = "forward_kl"
    """forward_kl, reverse_kl or jsd."""
    temperature: float = 1.0
    """Divides both models' logits."""
    beta: float = 0.5
    """jsd: share of the teacher in the mixture."""
    likelihood_weight: float = 0.0
    """Weight of the answers' own negative log-likelihood beside the divergence."""
    batch: int = 32
    """Rows of an optimiser step."""
    micro_tokens: int = 8192
    """Tokens of a forward and backward pass."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Optimiser."""
    run: UpdatesConfig = field(default_factory=UpdatesConfig)
    """Length in optimiser steps, seed, outputs."""

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence) or not 0.0 < self.beta < 1.0 or self.temperature <= 0.0:
            raise ConfigError(
                f"divergence={self.divergence!r}, beta={self.beta}, temperature={self.temperature}; expected one of "
                f"{', '.join(get_args(Divergence))}, 0 < beta < 1, temperature above 0"
            )


def train(config: DistillConfig, session: Session) -> Result:
    """Take the next rows, ask the teacher for its distributions, step on the divergence; repeat."""
    config.adapter.check(config.model.path)
    kernels.set_num_threads(config.run.threads)
    teacher = load_teacher(config.teacher, config.teacher_dtype)
    rows = JsonLines(Path(config.data.path))
    folder = teacher.folder_for(config.model)
    made = build(config.model, texts_of(rows), session.seed, folder, teacher.model.vocab_size)
    teacher.check(made)
    renderer = Renderer(made.tokenizer, config.data, min(made.model.max_context, teacher.model.max_context))
    held_out = read_examples(Path(config.held_out), renderer) if config.held_out else []
    adapter = config.adapter.build(made.model, session.seed)
    learner = Learner(made.model, config.learner, adapter=adapter, total_steps=config.run.total_steps)
    write_model = written(learner, partial(write_weights, made))
    session.begin({"learner": learner, **frozen_parts(made.model, adapter)}, write_model)

    read = supervised_rows(rows, renderer)
    check_rows(rows, renderer, read, session, batch=config.batch, micro_tokens=config.micro_tokens)
    while True:
        if held_out and session.evaluation_due:
            session.record(evaluated(learner, lambda now: likelihoods(now, held_out, config.micro_tokens)))
        session.checkpoint()
        if not session.running:
            break
        numbers = shuffled(len(rows), config.batch, session.seed, session.step)
        examples = [example for number in numbers for example in read(number)]
        num_tokens = sum(float(example.weight.sum()) for example in examples)
        loss = divergence_loss(config, made.model, teacher.model, max(num_tokens, 1.0))
        metrics = learner.step(micro_batches(examples, config.micro_tokens), loss)
        session.advance(metrics | {"epoch": session.step * config.batch / len(rows), "skipped": renderer.num_skipped})
    rows.close()
    return session.finish()


def divergence_loss(config: DistillConfig, student: LanguageModel, teacher: LanguageModel, num_tokens: float) -> Loss:
    """Mean divergence over `num_tokens` weighted tokens of the whole batch, plus the weighted likelihood."""

    def loss(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        divergence_R = micro_divergence(
            student, teacher, logprobs, micro, config.divergence, temperature=config.temperature, beta=config.beta
        )
        share = (divergence_R * micro.weight_R).sum() / num_tokens
        nll = -(logprobs.logprob_R * micro.weight_R).sum() / num_tokens
        metrics = {"divergence": share.detach(), "nll": nll.detach()}
        return share + config.likelihood_weight * nll, metrics

    return loss


def micro_divergence(
    student: LanguageModel,
    teacher: LanguageModel,
    logprobs: Logprobs,
    micro: MicroBatch,
    kind: str,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """`distribution_divergence` [R] of two models at the rows of a micro-batch, differentiable in the student. Some rows'
    logits are held at a time, in both passes: [R, V] never is.

    Args:
        teacher: asked here, without gradients. Where the two pad their vocabularies differently, the tokens that both have
            are compared.
        logprobs: of the student, whose hidden states are taken.
    """
    shared = min(student.vocab_size, teacher.vocab_size)
    with torch.no_grad():
        teacher_RE = teacher(micro.batch, None).index_select(0, micro.rows_R)

    def some(student_rE: Tensor, teacher_rE: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_rV = teacher.logits(teacher_rE)[:, :shared]
        student_rV = student.logits(student_rE)[:, :shared]
        return distribution_divergence(student_rV, teacher_rV, kind, temperature=temperature, beta=beta)

    parts = zip(logprobs.hidden_RE.split(ROWS), teacher_RE.split(ROWS), strict=True)
    return torch.cat([checkpoint(some, *pair, use_reentrant=False, preserve_rng_state=False) for pair in parts])
