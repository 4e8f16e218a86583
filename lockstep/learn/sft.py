"""Supervised fine-tuning: maximum likelihood of answers after their prompts, packed and masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.learn.adapter import AdapterConfig, frozen_parts, write_weights
from lockstep.learn.ahead import check_rows, some
from lockstep.learn.data import DataConfig, JsonLines, Renderer, shuffled, texts_of
from lockstep.learn.learner import Learner, LearnerConfig, Weights, evaluated, written
from lockstep.learn.logprobs import forward_logprobs
from lockstep.learn.losses import likelihood_loss
from lockstep.learn.model import ModelConfig, build
from lockstep.learn.packing import Example, micro_batches
from lockstep.learn.session import Result, Scores, Session, UpdatesConfig


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning on a JSON-lines file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapter that is trained in its stead."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows with "messages", "prompt" and "completion", or "text"."""
    held_out: str = ""
    """JSON-lines file of rows to evaluate on (empty: none)."""
    batch: int = 32
    """Rows of an optimiser step."""
    micro_tokens: int = 8192
    """Tokens of a forward and backward pass."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Optimiser."""
    run: UpdatesConfig = field(default_factory=UpdatesConfig)
    """Length in optimiser steps, seed, outputs."""


def train(config: SFTConfig, session: Session) -> Result:
    """Take the next rows in shuffled order, render, pack, step; repeat."""
    if config.batch < 1:
        raise ConfigError(f"batch={config.batch}; expected 1 or more")
    config.adapter.check(config.model.path)
    kernels.set_num_threads(config.run.threads)
    rows = JsonLines(Path(config.data.path))
    folder = session.directory.path / "tokenizer" if session.directory else None
    made = build(config.model, texts_of(rows), session.seed, folder)
    renderer = Renderer(made.tokenizer, config.data, made.model.max_context)
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
        metrics = learner.step(micro_batches(examples, config.micro_tokens), likelihood_loss(max(num_tokens, 1.0)))
        session.advance(
            metrics
            | {"tokens": num_tokens, "epoch": session.step * config.batch / len(rows), "skipped": renderer.num_skipped}
        )
    rows.close()
    return session.finish()


def read_examples(path: Path, renderer: Renderer) -> list[Example]:
    """All rows of a file, in its order.

    Raises:
        FormatError: names file and line.
        ConfigError: every row is skipped.
    """
    rows = JsonLines(path)
    found = [renderer.supervised(rows[number], rows.where(number)) for number in range(len(rows))]
    rows.close()
    return some(path, renderer, [example for example in found if example is not None])


def supervised_rows(rows: JsonLines, renderer: Renderer) -> Callable[[int], list[Example]]:
    """A row's number -> its example, or none where the row is skipped."""

    def read(number: int) -> list[Example]:
        example = renderer.supervised(rows[number], rows.where(number))
        return [] if example is None else [example]

    return read


def likelihoods(weights: Weights, examples: Sequence[Example], micro_tokens: int) -> Scores:
    """Mean log-probability a learned token, one number a row; higher is better."""
    values = [0.0] * len(examples)
    micros = micro_batches(examples, micro_tokens)
    for micro, logprob_R in zip(micros, forward_logprobs(weights.model, micros, adapter=weights.adapter), strict=True):
        mean_S = micro.sequence_sum(logprob_R * micro.weight_R) / micro.sequence_sum(micro.weight_R)
        for place, value in zip(micro.examples, mean_S.tolist(), strict=True):
            values[place] = value
    return Scores(tuple(values))
