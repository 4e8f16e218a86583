"""From scored groups to gradient steps.

Who divides by what: the loss of a minibatch divides by `Counts` of that whole minibatch, so micro-batches only add up. What
has no gradient (a group whose rewards are all equal, where nothing else pulls) is counted and not computed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError, EnvError, ExactnessError
from lockstep.core.trajectory import Trajectory
from lockstep.layers.low_rank import Adapter
from lockstep.learn.learner import Learner, Loss, Metrics
from lockstep.learn.logprobs import Logprobs, Truncation, forward_logprobs
from lockstep.learn.packing import Example, MicroBatch, micro_batches
from lockstep.models.language import LanguageModel
from lockstep.rl.lm.advantages import (
    Rewards,
    overlong_penalty,
    sequence_advantages,
    token_gae,
    token_rewards,
    whitened_tokens,
)
from lockstep.rl.lm.algorithms import ALGORITHMS, PolicyLossConfig
from lockstep.rl.lm.losses import Counts, policy_loss
from lockstep.rl.lm.rollout import Group, RolloutConfig
from lockstep.rl.lm.teacher import OnlineTeacher

SampleKey = tuple[int, int]
"""(number of the group, index of the sample in it)."""

BROKEN = 16
"""Answers in a row that no verifier fails to judge by chance."""

_OF_THE_LAST = ("clip_fraction", "old_kl", "ratio_max")
"""Metrics that tell something after the first step only."""


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """What is done with a batch of scored groups."""

    loss: PolicyLossConfig = field(default_factory=lambda: ALGORITHMS["dapo"])
    """The algorithm: advantage, ratio, clip, aggregation, correction, penalties."""
    minibatches: int = 1
    """Optimiser steps of a pass over the batch; the first is on-policy, later ones are clipped against it."""
    epochs: int = 1
    """Passes over the batch."""
    micro_tokens: int = 8192
    """Tokens of a forward and backward pass; those of the longest sample, where it has more."""
    drop_uniform: bool = False
    """Leave groups whose rewards are all equal out of the counts too, as DAPO's dynamic sampling does."""
    drop_truncated: bool = False
    """Learn nothing of answers that a limit of tokens or turns cut off (DAPO's overlong filtering); their rewards still count
    in what their group is compared with."""
    overlong_buffer: int = 0
    """Tokens before the limit over which the reward falls linearly by up to 1 (DAPO's soft punishment; 0: none)."""
    exact: bool = True
    """Demand that the learner's log-probabilities of fresh samples are the sampler's, bit for bit."""

    def __post_init__(self) -> None:
        if min(self.minibatches, self.epochs, self.micro_tokens) < 1:
            raise ConfigError(
                f"minibatches={self.minibatches}, epochs={self.epochs}, micro_tokens={self.micro_tokens}; expected 1 or more"
            )

    @property
    def num_steps(self) -> int:
        """Optimiser steps of a batch."""
        return self.minibatches * self.epochs

    @property
    def pulls_everywhere(self) -> bool:
        """Whether a sample without advantage has a gradient too."""
        loss = self.loss
        return max(loss.kl.coef, loss.entropy_coef, loss.value_coef, loss.teacher.coef) > 0.0


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """The examples of one optimiser step, and what its loss divides by."""

    examples: tuple[Example, ...]
    samples: tuple[SampleKey, ...]
    """Of each example, which sample it is."""
    counts: Counts
    """Of both kinds of examples."""
    references: tuple[Example, ...] = ()
    """Answers that nobody sampled: a teacher alone says something of them."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Groups as minibatches."""

    minibatches: tuple[Minibatch, ...]
    temperature: float
    truncation: Truncation | None
    num_unscored: int
    """Samples whose verifier failed: they teach nothing."""
    advantages: Mapping[SampleKey, float]
    """Of the scored samples; none where a value head makes them, token by token."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed in one pass."""
        return sum(len(example.tokens) for part in self.minibatches for example in (*part.examples, *part.references))


def make_batch(
    groups: Sequence[Group],
    config: LearnConfig,
    rollout: RolloutConfig,
    version: int,
    references: Sequence[Example] = (),
) -> Batch:
    """Advantages of all scored samples, then one example for each sample that has a gradient.

    Args:
        version: of the learner; samples wholly of it are held to its bits where `exact`.
        references: answers for a teacher to speak of, spread over the minibatches.

    Raises:
        EnvError: not one of many samples could be judged: the verifier does not work, and nothing would be learned; or no
            prompt of the batch left room for an answer.
    """
    if not any(group.trajectories for group in groups):
        raise EnvError(
            f"no prompt of update {version + 1} leaves room for rollout.max_tokens={rollout.max_tokens} in the context; give a "
            "model with more positions, or shorter problems"
        )
    all_rows = [(group, one) for group in groups for one in group.trajectories]
    rows = [(group, one) for group, one in all_rows if one.score and one.score.is_scored]
    num_unscored = len(all_rows) - len(rows)
    if len(all_rows) >= BROKEN and not rows and config.loss.advantage != "none":
        raise unjudged([one for _, one in all_rows], f"of update {version + 1}")
    if config.loss.advantage == "none":
        rows = all_rows
    advantages = _advantages(rows, config, rollout)
    all_fresh = all(_is_fresh(one, version) for _, one in rows)
    # The sampler's numbers are the learner's: no forward pass is needed for what later steps are clipped against. And where
    # the samples are older and nothing else corrects for it, the algorithm's own ratio does: its old policy is the sampler's.
    old_is_samplers = config.loss.correction.kind == "none"
    if all_fresh:
        old_is_samplers = config.exact and config.num_steps > 1
    place_of = {group.number: place for place, group in enumerate(groups)}
    examples: list[list[tuple[SampleKey, Example]]] = [[] for _ in range(config.minibatches)]
    counted: list[list[Example]] = [[] for _ in range(config.minibatches)]
    for (group, one), advantage in zip(rows, advantages, strict=True):
        if config.drop_truncated and one.is_truncated:
            continue
        part = place_of[group.number] % config.minibatches
        example = _example(one, advantage, config, rollout, version)
        if old_is_samplers:
            example = replace(example, columns={**example.columns, "old_logprob": example.columns["sampling_logprob"]})
        # Where values are learned, "advantage" is still the score, and says nothing about silence; a teacher's pupil has none.
        silent = advantage == 0.0 and config.loss.advantage not in ("gae", "none")
        if not (silent and config.drop_uniform):
            counted[part].append(example)
        if not silent or config.pulls_everywhere:
            examples[part].append(((group.number, one.index), example))
    parts = []
    for place, (kept, all_of) in enumerate(zip(examples, counted, strict=True)):
        given = tuple(references[place :: config.minibatches])
        if kept or given:
            keys, chosen = tuple(key for key, _ in kept), tuple(example for _, example in kept)
            counts = replace(Counts.of([*all_of, *given]), measured=Counts.of(chosen).tokens)
            parts.append(Minibatch(examples=chosen, samples=keys, counts=counts, references=given))
    return Batch(
        minibatches=tuple(parts),
        temperature=rollout.temperature,
        truncation=rollout.truncation,
        num_unscored=num_unscored,
        advantages={}
        if config.loss.advantage in ("gae", "none")
        else {(group.number, one.index): value for (group, one), value in zip(rows, advantages, strict=True)},
    )


def unjudged(trajectories: Sequence[Trajectory], where: str) -> EnvError:
    """What to say where no answer could be judged."""
    first = next((one.score for one in trajectories if one.score is not None), None)
    why = "no score" if first is None else f"{first.verdict.value}: {first.detail}"
    return EnvError(
        f"none of {len(trajectories)} answers {where} could be judged; the first: {why}. Look at the verifier with "
        "`lockstep doctor TASK`, or RECIPE with the run's options"
    )


class Update:
    """The gradient steps of one batch, in two parts: what needs no change of weights, and the rest.

    Args:
        learner: with the head "value" where the advantage is gae.
        reference: the policy that a KL penalty pulls to: a model, without the learner's adapter.
        teacher: whose divergence from the learner pulls too.
    """

    def __init__(
        self,
        learner: Learner,
        batch: Batch,
        config: LearnConfig,
        reference: LanguageModel | None = None,
        teacher: OnlineTeacher | None = None,
    ) -> None:
        self.metrics: dict[str, float] = {"unscored": float(batch.num_unscored)}
        self.mismatch: dict[SampleKey, float] = {}
        """Largest difference of a sample's log-probabilities, the learner's of its version beside the sampler's."""
        self._learner, self._batch, self._config = learner, batch, config
        self._began = time.perf_counter()
        self._total = 0.0
        self._divergence = None
        if teacher is not None:
            self._divergence = teacher.divergence(learner, config.loss.teacher)
        self._packed = [_packed(part.examples, config) + _packed(part.references, config) for part in batch.minibatches]
        if reference is not None and config.loss.kl.coef > 0.0:
            self._packed = [self._with(micros, "reference_logprob", reference, None) for micros in self._packed]

    def prepare(self) -> None:
        """The first step's gradient, and the log-probabilities that later ones are clipped against."""
        if not self._packed:
            return
        is_given = any("old_logprob" in micro.columns for micros in self._packed for micro in micros)
        if self._config.num_steps > 1 and not is_given:
            model, adapter = self._learner.model, self._learner.adapter
            self._packed = [self._with(micros, "old_logprob", model, adapter) for micros in self._packed]
        if self._config.loss.advantage == "gae":
            self._packed = self._valued(self._packed)
        self._accumulate(0, exact=self._config.exact, measure=True)

    def finish(self) -> None:
        """All optimiser steps. Metrics are of the first one, but for the clip fraction and the KL of the last."""
        if not self._packed:
            return
        self.metrics |= self._learner.apply(self._total)
        for epoch in range(self._config.epochs):
            for place in range(len(self._packed)):
                if epoch or place:
                    last = self._accumulate(place, exact=False, measure=epoch == 0)
                    self.metrics |= self._learner.apply(self._total)
                    self.metrics |= {name: last[name] for name in _OF_THE_LAST if name in last}
        seconds = time.perf_counter() - self._began
        self.metrics |= {"learn_s": seconds, "learn_tok_s": self._batch.num_tokens * self._config.epochs / seconds}

    def _accumulate(self, place: int, *, exact: bool, measure: bool) -> dict[str, float]:
        part, head = self._batch.minibatches[place], self._learner.heads.get("value")
        plain = loss = policy_loss(self._config.loss, part.counts, value_head=head, divergence=self._divergence)
        if measure:
            loss = measured(loss, part.samples, self.mismatch)
        if exact:
            loss = exactly(loss)

        def of_either(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, Metrics]:
            return (loss if "sampling_logprob" in micro.columns else plain)(logprobs, micro)

        self._total, metrics = self._learner.accumulate(
            self._packed[place],
            of_either,
            temperature=self._batch.temperature,
            truncation=self._batch.truncation,
            entropy=True,
        )
        self.metrics = metrics | self.metrics
        return metrics

    def _with(
        self, micros: list[MicroBatch], column: str, model: LanguageModel, adapter: Adapter | None
    ) -> list[MicroBatch]:
        heat, truncation = self._batch.temperature, self._batch.truncation
        found = forward_logprobs(model, micros, temperature=heat, truncation=truncation, adapter=adapter)
        return [
            replace(micro, columns={**micro.columns, column: logprob_R})
            for micro, logprob_R in zip(micros, found, strict=True)
        ]

    @torch.no_grad()
    def _valued(self, packed: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """Token advantages from the value head, whitened over the batch; each sample's score comes at its last token, and a
        penalty at each token where the KL is in the reward."""
        config, model, head = self._config.loss, self._learner.model, self._learner.heads["value"]
        adapter = self._learner.adapter
        made = []
        for micros in packed:
            for micro in micros:
                batch = micro.batch if adapter is None else micro.batch.with_adapter(adapter)
                value_R = head(model(batch, None).index_select(0, micro.rows_R))
                score_S = micro.sequence_sum(micro.columns["advantage"]) / micro.sequence_rows().clamp(min=1.0)
                kl_R = None
                if config.kl.in_reward:
                    kl_R = micro.columns["sampling_logprob"] - micro.columns["reference_logprob"]
                advantage_R, return_R = token_gae(
                    token_rewards(score_S, micro.sequence_R, kl_R=kl_R, kl_coef=config.kl.coef),
                    value_R,
                    micro.sequence_R,
                    gamma=config.gamma,
                    lam=config.gae_lambda,
                )
                made.append((micro, advantage_R, return_R, value_R))
        white = whitened_tokens([one[1] for one in made], [one[0].weight_R for one in made])
        valued = iter(
            micro.with_columns(**{"advantage": advantage_R, "return": return_R, "old_value": value_R})
            for (micro, _, return_R, value_R), advantage_R in zip(made, white, strict=True)
        )
        return [[next(valued) for _ in micros] for micros in packed]


def _packed(examples: Sequence[Example], config: LearnConfig) -> list[MicroBatch]:
    return micro_batches(examples, max([config.micro_tokens, *(len(one.tokens) for one in examples)]))


def exactly(loss: Loss) -> Loss:
    """The loss, once the learner's log-probabilities of fresh tokens are the recorded ones to the last bit.

    Raises, later:
        ExactnessError: they are not; nothing is learned from the batch.
    """

    def checked(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        recorded_R, is_fresh_R = micro.columns["recorded_logprob"], micro.columns["fresh"]
        found_R = logprobs.logprob_R.detach()
        wrong = ((found_R != recorded_R) & (is_fresh_R > 0)).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise ExactnessError(
                f"{len(wrong)} of {len(recorded_R)} tokens differ; the first: position {int(micro.positions_R[row])} of "
                f"example {micro.examples[int(micro.sequence_R[row])]}, learner {float(found_R[row])!r}, sampler "
                f"{float(recorded_R[row])!r}. The weights that were sampled from are not the learner's, or a kernel depends "
                "on the batch; exact=False corrects by importance weights instead"
            )
        return loss(logprobs, micro)

    return checked


def measured(loss: Loss, samples: Sequence[SampleKey], mismatch: dict[SampleKey, float]) -> Loss:
    """The loss, which notes how far the learner's log-probabilities of each sample are from the sampler's at most."""

    def noted(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        old_R = micro.columns.get("old_logprob", logprobs.logprob_R.detach())
        gap_R = (old_R - micro.columns["sampling_logprob"]).abs()
        largest_S = gap_R.new_zeros(micro.num_sequences).scatter_reduce(0, micro.sequence_R, gap_R, "amax")
        for place, value in zip(micro.examples, largest_S.tolist(), strict=True):
            mismatch[samples[place]] = value
        return loss(logprobs, micro)

    return noted


def _advantages(rows: Sequence[tuple[Group, Trajectory]], config: LearnConfig, rollout: RolloutConfig) -> list[float]:
    if not rows:
        return []
    rewards = []
    for _, one in rows:
        assert one.score is not None
        extra = 0.0
        if config.overlong_buffer:
            extra = overlong_penalty(one.num_sampled, rollout.max_tokens, config.overlong_buffer)
        rewards.append(one.score.value + extra)
    baseline = None
    if config.loss.advantage == "greedy_baseline":
        scores = [group.baseline.score if group.baseline is not None else None for group, _ in rows]
        # A greedy answer that could not be judged is no baseline: 0, the value of none.
        baseline = torch.tensor([s.value if s is not None and s.is_scored else 0.0 for s in scores])
    if config.loss.advantage == "gae":
        return rewards
    given = Rewards(
        reward_N=torch.tensor(rewards, dtype=torch.float32),
        group_N=torch.tensor([group.number for group, _ in rows]),
        baseline_N=baseline,
        k=config.loss.k,
    )
    return sequence_advantages(config.loss.advantage, given).tolist()


def _example(
    trajectory: Trajectory, advantage: float, config: LearnConfig, rollout: RolloutConfig, version: int
) -> Example:
    num = len(trajectory.tokens)
    fresh = _is_fresh(trajectory, version)
    columns = {"advantage": [advantage] * num, "sampling_logprob": trajectory.sampling_logprobs}
    if config.exact:
        columns |= {"recorded_logprob": trajectory.sampling_logprobs, "fresh": [float(fresh)] * num}
    return Example.of(trajectory.tokens, weight=[float(one) for one in trajectory.is_sampled], columns=columns)


def _is_fresh(trajectory: Trajectory, version: int) -> bool:
    """Whether all of it was sampled, and so all its keys computed, by this version."""
    return all(stamp is None or stamp.version == version for stamp in trajectory.versions)
