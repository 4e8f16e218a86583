"""Learning from preferences without reinforcement: DPO, IPO, KTO, ORPO and SimPO are this loop with another loss.

Legend: P pairs (a chosen and a rejected answer to one prompt), S sequences of a micro-batch, N answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.learn import losses
from lockstep.learn.adapter import AdapterConfig, frozen_parts, write_weights
from lockstep.learn.ahead import check_rows, some
from lockstep.learn.data import DataConfig, JsonLines, Renderer, shuffled
from lockstep.learn.learner import Learner, LearnerConfig, Loss, Metrics, Weights, evaluated, written
from lockstep.learn.logprobs import Logprobs, forward_logprobs
from lockstep.learn.model import ModelConfig, build
from lockstep.learn.packing import Example, MicroBatch, micro_batches
from lockstep.learn.session import Result, Scores, Session, UpdatesConfig
from lockstep.models.language import LanguageModel

Method = Literal["dpo", "ipo", "kto", "orpo", "simpo"]
WITH_REFERENCE = ("dpo", "ipo", "kto")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Preference training on a JSON-lines file of pairs; KTO takes labelled answers."""

    method: Method = "dpo"
    """dpo, ipo, kto, orpo or simpo."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model goes on; for dpo, ipo and kto its first weights are the reference."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapter that is trained in its stead."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows with "prompt", "chosen" and "rejected"; for kto "prompt", "completion" and "label"."""
    held_out: str = ""
    """JSON-lines file of pairs to evaluate on (empty: none); not for kto."""
    beta: float = 0.1
    """Strength of the pull to the reference (dpo, kto); scale of the reward (simpo, where 2 is usual)."""
    label_smoothing: float = 0.0
    """dpo: chance that a label is wrong."""
    tau: float = 0.1
    """ipo: strength of the pull to the reference."""
    odds_weight: float = 0.1
    """orpo: weight λ of the odds ratio beside the likelihood."""
    gamma: float = 1.0
    """simpo: margin that the chosen answer's reward is to have."""
    good_weight: float = 1.0
    """kto: weight of good answers."""
    bad_weight: float = 1.0
    """kto: weight of bad answers."""
    batch: int = 16
    """Rows of an optimiser step."""
    micro_tokens: int = 8192
    """Tokens of a forward and backward pass; a pair stays together."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Optimiser."""
    run: UpdatesConfig = field(default_factory=UpdatesConfig)
    """Length in optimiser steps, seed, outputs."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(f"method={self.method!r}; expected one of {', '.join(get_args(Method))}")
        if self.method == "kto" and (self.held_out or self.batch < 2):
            raise ConfigError(
                "kto estimates a KL from other rows' answers: batch must be 2 or more, and held_out empty"
            )
        if self.batch < 1 or not 0.0 <= self.label_smoothing < 0.5 or self.beta <= 0.0 or self.tau <= 0.0:
            raise ConfigError(
                f"batch={self.batch}, label_smoothing={self.label_smoothing}, beta={self.beta}, tau={self.tau}; expected "
                "batch >= 1, 0 <= label_smoothing < 0.5, beta and tau above 0"
            )


def train(config: PreferenceConfig, session: Session) -> Result:
    """Take the next rows, ask the reference, step on the margins; repeat."""
    if not config.model.path:
        raise ConfigError("preferences are learned by a model that can answer already; give model.path")
    kernels.set_num_threads(config.run.threads)
    rows = JsonLines(Path(config.data.path))
    made = build(config.model, [], session.seed, None)
    adapter = config.adapter.build(made.model, session.seed)
    reference = None
    if config.method in WITH_REFERENCE:
        # Of an adapter it is the model itself, without it.
        reference = made.model if adapter is not None else build(config.model, [], session.seed, None).model
        reference.requires_grad_(False)
    renderer = Renderer(made.tokenizer, config.data, made.model.max_context)
    held_out = read_pairs(Path(config.held_out), renderer) if config.held_out else []
    learner = Learner(made.model, config.learner, adapter=adapter, total_steps=config.run.total_steps)
    write_model = written(learner, partial(write_weights, made))
    session.begin({"learner": learner, **frozen_parts(made.model, adapter)}, write_model)

    def read(number: int) -> Sequence[Example]:
        row, where = rows[number], rows.where(number)
        if config.method == "kto":
            example = renderer.completion(*renderer.labelled(row, where)[:2], where)
            return [] if example is None else [example]
        return renderer.pair(row, where) or ()

    check_rows(rows, renderer, read, session, batch=config.batch, micro_tokens=config.micro_tokens)
    while True:
        if held_out and session.evaluation_due:
            session.record(evaluated(learner, lambda now: accuracies(config, now, reference, held_out)))
        session.checkpoint()
        if not session.running:
            break
        numbers = shuffled(len(rows), config.batch, session.seed, session.step)
        if config.method == "kto":
            assert reference is not None
            micros, loss = _labelled(config, learner, reference, rows, renderer, numbers)
        else:
            examples = [one for number in numbers for one in read(number)]
            micros = micro_batches(examples, config.micro_tokens, together=2)
            micros, loss = with_reference(micros, reference), pair_loss(config, len(examples) // 2)
        metrics = learner.step(micros, loss)
        epoch = session.step * config.batch / len(rows)
        session.advance(metrics | {"epoch": epoch, "skipped": renderer.num_skipped})
    rows.close()
    return session.finish()


def pair_loss(config: PreferenceConfig, num: int) -> Loss:
    """The method's loss over `num` pairs, for micro-batches made with `together=2` and, where the method has one, a column
    "reference_logprob"."""

    def loss(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        chosen_P, rejected_P = pair_sums(logprobs.logprob_R, micro)
        if config.method in WITH_REFERENCE:
            reference = pair_sums(micro.columns["reference_logprob"], micro)
            margin_P = (chosen_P - reference[0]) - (rejected_P - reference[1])
            if config.method == "dpo":
                return losses.dpo_loss(margin_P, num=num, beta=config.beta, label_smoothing=config.label_smoothing)
            return losses.ipo_loss(margin_P, num=num, tau=config.tau)
        lengths = pair_sums(torch.ones_like(logprobs.logprob_R), micro)
        chosen_P, rejected_P = chosen_P / lengths[0], rejected_P / lengths[1]
        if config.method == "orpo":
            return losses.orpo_loss(chosen_P, rejected_P, num=num, weight=config.odds_weight)
        return losses.simpo_loss(chosen_P, rejected_P, num=num, beta=config.beta, gamma=config.gamma)

    return loss


def pair_sums(values_R: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Sums over the answers' tokens: (chosen [P], rejected [P])."""
    sums_S = micro.sequence_sum(values_R * micro.weight_R)
    return sums_S[0::2], sums_S[1::2]


def with_reference(micros: Sequence[MicroBatch], reference: LanguageModel | None) -> list[MicroBatch]:
    """With the reference's log-probabilities beside the tokens; as they are without one."""
    if reference is None:
        return list(micros)
    found = forward_logprobs(reference, micros)
    return [m.with_columns(reference_logprob=logprob_R) for m, logprob_R in zip(micros, found, strict=True)]


def _labelled(
    config: PreferenceConfig,
    learner: Learner,
    reference: LanguageModel,
    rows: JsonLines,
    renderer: Renderer,
    numbers: Sequence[int],
) -> tuple[list[MicroBatch], Loss]:
    """KTO's batch and loss. The KL is estimated from each prompt with the next row's answer, without gradients."""
    found = [(renderer.labelled(rows[number], rows.where(number)), rows.where(number)) for number in numbers]
    examples, mismatched, labels = [], [], []
    for place, ((prompt, answer, label), where) in enumerate(found):
        example = renderer.completion(prompt, answer, where)
        if example is None:
            continue
        examples.append(example)
        labels.append(label)
        stranger = found[(place + 1) % len(found)][0][1]
        # Two rows that fit may not fit together: then this one says nothing of the KL.
        if len(prompt) + len(stranger) <= min(renderer.limit, config.micro_tokens):
            mismatched.append(Example.of([*prompt, *stranger], weight=[0.0] * len(prompt) + [1.0] * len(stranger)))
    strangers = with_reference(micro_batches(mismatched, config.micro_tokens), reference)
    kl = math.fsum(
        float(((logprob_R - micro.columns["reference_logprob"]) * micro.weight_R).sum())
        for micro, logprob_R in zip(strangers, learner.forward_logprobs(strangers), strict=True)
    ) / max(len(mismatched), 1)
    micros = with_reference(micro_batches(examples, config.micro_tokens), reference)
    return micros, labelled_loss(config, labels, kl, len(examples))


def labelled_loss(config: PreferenceConfig, labels: Sequence[bool], kl: float, num: int) -> Loss:
    """KTO's loss for micro-batches with a column "reference_logprob".

    Args:
        labels: of each example, in the order handed to `micro_batches`.
        kl: of the whole batch.
        num: answers of the whole batch.
    """
    is_good_N = torch.tensor(labels)

    def loss(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        ratio_R = logprobs.logprob_R - micro.columns["reference_logprob"]
        share, metrics = losses.kto_loss(
            micro.sequence_sum(ratio_R * micro.weight_R),
            is_good_N[list(micro.examples)],
            kl,
            num=num,
            beta=config.beta,
            good_weight=config.good_weight,
            bad_weight=config.bad_weight,
        )
        return share, metrics | {"kl": torch.tensor(max(kl, 0.0) * micro.num_sequences / num)}

    return loss


def read_pairs(path: Path, renderer: Renderer) -> list[Example]:
    """All pairs of a file: chosen, rejected, chosen, ...

    Raises:
        FormatError: names file and line.
        ConfigError: every row is skipped.
    """
    rows = JsonLines(path)
    found = [renderer.pair(rows[number], rows.where(number)) for number in range(len(rows))]
    rows.close()
    return some(path, renderer, [one for pair in found if pair is not None for one in pair])


def accuracies(
    config: PreferenceConfig, weights: Weights, reference: LanguageModel | None, pairs: Sequence[Example]
) -> Scores:
    """1 for each pair whose chosen answer the model ranks higher (by the method's own reward), 0 for the others.

    Before the first step a method with a reference ranks nothing: all margins are 0.
    """
    values = [0.0] * (len(pairs) // 2)
    micros = with_reference(micro_batches(pairs, config.micro_tokens, together=2), reference)
    found = forward_logprobs(weights.model, micros, adapter=weights.adapter)
    for micro, logprob_R in zip(micros, found, strict=True):
        reward_R = logprob_R
        if config.method in WITH_REFERENCE:
            reward_R = logprob_R - micro.columns["reference_logprob"]
        chosen_P, rejected_P = pair_sums(reward_R, micro)
        if config.method not in WITH_REFERENCE:
            lengths = pair_sums(torch.ones_like(reward_R), micro)
            chosen_P, rejected_P = chosen_P / lengths[0], rejected_P / lengths[1]
        for place, is_right in zip(micro.examples[0::2], (chosen_P > rejected_P).tolist(), strict=True):
            values[place // 2] = float(is_right)
    return Scores(tuple(values))
