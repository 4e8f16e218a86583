"""Reward models: a language model whose last hidden state says how good an answer is, learned from comparisons.

Legend: P pairs, S sequences of a micro-batch, E model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.interop.hf.save import save_folder
from lockstep.layers.low_rank import Adapter
from lockstep.learn.adapter import AdapterConfig, frozen_parts, melted
from lockstep.learn.ahead import check_rows
from lockstep.learn.data import DataConfig, JsonLines, Renderer, shuffled
from lockstep.learn.heads import ScalarHead
from lockstep.learn.learner import Learner, LearnerConfig, Loss, Metrics, Weights, evaluated, written
from lockstep.learn.logprobs import Logprobs
from lockstep.learn.losses import bradley_terry_loss
from lockstep.learn.model import ModelConfig, TrainedModel, build
from lockstep.learn.packing import Example, MicroBatch, micro_batches
from lockstep.learn.preference import read_pairs
from lockstep.learn.session import Result, Scores, Session, UpdatesConfig
from lockstep.models.families import hf_tensors
from lockstep.models.language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """A reward model by the Bradley-Terry likelihood of comparisons."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model goes on."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapter that is trained in its stead."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows with "prompt", "chosen" and "rejected"."""
    held_out: str = ""
    """JSON-lines file of pairs to evaluate on (empty: none)."""
    centre: float = 0.01
    """Weight of (r_chosen + r_rejected)²."""
    batch: int = 32
    """Rows of an optimiser step."""
    micro_tokens: int = 8192
    """Tokens of a forward and backward pass; a pair stays together."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Optimiser."""
    run: UpdatesConfig = field(default_factory=UpdatesConfig)
    """Length in optimiser steps, seed, outputs."""


def train(config: RewardModelConfig, session: Session) -> Result:
    """Take the next pairs, score both answers at their last token, step on the difference; repeat."""
    if not config.model.path:
        raise ConfigError("a reward model goes on from a language model; give model.path")
    kernels.set_num_threads(config.run.threads)
    rows = JsonLines(Path(config.data.path))
    made = build(config.model, [], session.seed, None)
    head = ScalarHead(made.model.facts.width)
    head.fill_random(torch.Generator().manual_seed(session.seed), (made.model.facts.width + 1) ** -0.5)
    if not made.model.tied:
        made.model.head.requires_grad_(False)  # no reward goes through it
    # `at_the_end` adds a token.
    renderer = Renderer(made.tokenizer, config.data, made.model.max_context - 1)
    held_out = read_pairs(Path(config.held_out), renderer) if config.held_out else []
    adapter, steps = config.adapter.build(made.model, session.seed), config.run.total_steps
    learner = Learner(made.model, config.learner, adapter=adapter, heads={"reward": head}, total_steps=steps)

    def write(now: Weights, path: Path, results: Mapping[str, Any]) -> None:
        save_reward_model(path, replace(made, model=melted(now)), head_of(now))

    session.begin({"learner": learner, **frozen_parts(made.model, adapter)}, written(learner, write))

    def read(number: int) -> list[Example]:
        return [at_the_end(one) for one in renderer.pair(rows[number], rows.where(number)) or ()]

    check_rows(rows, renderer, read, session, batch=config.batch, micro_tokens=config.micro_tokens)
    while True:
        if held_out and session.evaluation_due:
            session.record(evaluated(learner, lambda now: accuracies(now, held_out, config.micro_tokens)))
        session.checkpoint()
        if not session.running:
            break
        numbers = shuffled(len(rows), config.batch, session.seed, session.step)
        examples = [one for number in numbers for one in read(number)]
        micros = micro_batches(examples, config.micro_tokens, together=2)
        metrics = learner.step(micros, comparison_loss(head, len(examples) // 2, config.centre))
        session.advance(metrics | {"epoch": session.step * config.batch / len(rows), "skipped": renderer.num_skipped})
    rows.close()
    return session.finish()


def head_of(weights: Weights) -> ScalarHead:
    """The learner's reward head, with this set of weights."""
    head = weights.heads["reward"]
    assert isinstance(head, ScalarHead)
    return head


def accuracies(weights: Weights, pairs: Sequence[Example], micro_tokens: int) -> Scores:
    """1 for each pair (chosen, rejected, chosen, ...) whose chosen answer has the higher reward, 0 for the others."""
    rewards = score(weights.model, head_of(weights), pairs, micro_tokens, weights.adapter)
    return Scores(
        tuple(float(chosen > rejected) for chosen, rejected in zip(rewards[0::2], rewards[1::2], strict=True))
    )


def at_the_end(example: Example) -> Example:
    """The same tokens and one more that is never read, whose row is the last token's: where the reward is taken."""
    tokens = torch.cat([example.tokens, example.tokens[-1:]])
    weight = torch.zeros(len(tokens))
    weight[-1] = 1.0
    return Example(tokens=tokens, weight=weight)


def comparison_loss(head: ScalarHead, num: int, centre: float) -> Loss:
    """Bradley-Terry over `num` pairs of examples made by `at_the_end`."""

    def loss(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        reward_S = head(logprobs.hidden_RE)
        return bradley_terry_loss(reward_S[0::2], reward_S[1::2], num=num, centre=centre)

    return loss


@torch.no_grad()
def score(
    model: LanguageModel,
    head: ScalarHead,
    examples: Sequence[Example],
    micro_tokens: int,
    adapter: Adapter | None = None,
) -> list[float]:
    """Rewards of whole texts, in order."""
    rewards = [0.0] * len(examples)
    for micro in micro_batches(
        [replace(at_the_end(one), columns={}) for one in examples], micro_tokens + 2, together=1
    ):
        batch = micro.batch if adapter is None else micro.batch.with_adapter(adapter)
        hidden_SE = model(batch, None).index_select(0, micro.rows_R)
        for place, reward in zip(micro.examples, head(hidden_SE).tolist(), strict=True):
            rewards[place] = reward
    return rewards


def save_reward_model(path: Path, made: TrainedModel, head: ScalarHead) -> None:
    """A folder that `transformers.AutoModelForSequenceClassification` reads: the trunk and `score.weight`."""
    tensors = {name: t for name, t in hf_tensors(made.model, made.config).items() if not name.startswith("lm_head.")}
    tensors["score.weight"] = head.weight.detach()
    save_folder(path, classifier_config(made), tensors, tokenizer_from=made.tokenizer_folder, overwrite=True)


def classifier_config(made: TrainedModel) -> Mapping[str, Any]:
    """config.json of the sequence classifier: one label, and a padding token that no answer ends with."""
    names = [name.replace("ForCausalLM", "ForSequenceClassification") for name in made.config["architectures"]]
    names = [name.replace("LMHeadModel", "ForSequenceClassification") for name in names]
    ends, pad = made.tokenizer.eos_ids, made.tokenizer.pad_id
    if pad is None or pad in ends:
        pad = next(token for token in range(made.tokenizer.vocab_size) if token not in ends)
    return {**made.config, "architectures": names, "num_labels": 1, "id2label": {"0": "reward"}, "pad_token_id": pad}
