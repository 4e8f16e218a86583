"""Losses of reinforcement learning of language models: what `lockstep.rl.lm.algorithms` names, computed.

Three policies: π is being learned; π_old is what it was when the batch was collected, with the learner's numbers; μ is what
the sampler drew from (another precision, older weights, a truncated distribution). ratio = π / π_old is clipped; the
correction π_old / μ is a constant weight. In exact synchronous training π_old = μ, bit for bit, and the correction is 1.

Sign: every loss is minimised. A micro-batch's share divides by `Counts` of the whole batch, so that shares add up, whatever
the packing, the micro-batch size or the number of data-parallel ranks.

Legend: R sampled tokens (rows) of a micro-batch, S its sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError
from lockstep.learn.learner import Loss, Metrics
from lockstep.learn.logprobs import Logprobs
from lockstep.learn.packing import Example, MicroBatch
from lockstep.rl.lm.algorithms import CorrectionConfig, PolicyLossConfig


@dataclass(frozen=True)
class Counts:
    """What the whole batch holds, over all micro-batches and ranks: the loss's denominators.

    >>> Counts.of([Example.of([1, 2, 3], weight=[0, 1, 1]), Example.of([1, 2], weight=[0, 0])])
    Counts(tokens=2.0, sequences=1, measured=0.0)
    """

    tokens: float
    """Sum of the weights."""
    sequences: int
    """Sequences with a weighted token."""
    measured: float = 0.0
    """Weights of the tokens that are computed, of which metrics are means: of samples without a gradient nothing is known. 0:
    all are."""

    @staticmethod
    def of(examples: Sequence[Example]) -> Counts:
        return Counts(
            float(sum(float(example.weight.double().sum()) for example in examples)),
            sum(example.num_weighted > 0 for example in examples),
        )

    def __add__(self, other: Counts) -> Counts:
        """Of two ranks' batches together."""
        return Counts(self.tokens + other.tokens, self.sequences + other.sequences, self.measured + other.measured)


DivergenceOf = Callable[[Logprobs, MicroBatch], Tensor]
"""A teacher's divergence [R] from the student, which said these log-probabilities."""


def policy_loss(
    config: PolicyLossConfig,
    counts: Counts,
    *,
    value_head: Callable[[Tensor], Tensor] | None = None,
    divergence: DivergenceOf | None = None,
) -> Loss:
    """The loss for `Learner.step`. It reads the micro-batch's columns:

    "advantage"; "old_logprob", log π_old of each token (absent: π itself, held constant, which is right where each batch is
    learned from in one step); "sampling_logprob", log μ, for the correction and the mismatch metrics; "reference_logprob"
    with a KL penalty; "return" and "old_value" with a value head. A micro-batch without "sampling_logprob" holds answers that
    nobody sampled: only the teacher says something of them.

    Args:
        value_head: hidden [R, E] -> values [R]; where value_coef is above 0.
        divergence: of the teacher; where teacher.coef is above 0.

    Metrics, shares of the mean over the batch's computed tokens: policy_loss (over all tokens), clip_fraction, old_kl (k3
    between π_old and π), ratio_max; where their inputs are there reference_kl, entropy, mismatch_kl (k3 between μ and
    π_old), mismatch_max, correction (mean weight), masked_fraction, value_loss, value, divergence.

    Raises:
        ConfigError: fixed aggregation without max_length, value_coef without a value head, a teacher's coef without one;
            later, a column or the entropy
            that the configuration needs is not there.
    """
    if config.aggregation == "fixed" and config.max_length < 1:
        raise ConfigError("aggregation='fixed' divides by max_length; set it to the limit of new tokens")
    if config.value_coef > 0.0 and value_head is None:
        raise ConfigError(f"value_coef={config.value_coef} needs a value head")
    if config.teacher.coef > 0.0 and divergence is None:
        raise ConfigError(f"teacher coef={config.teacher.coef} needs a teacher")

    def loss(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        total, metrics = logprobs.logprob_R.new_zeros(()), Metrics()
        if config.teacher.coef > 0.0 and divergence is not None:
            share = aggregate(config, divergence(logprobs, micro), micro, counts)
            total, metrics = config.teacher.coef * share, {"divergence": share.detach()}
        if "sampling_logprob" not in micro.columns:
            return total, metrics
        policy, of_policy = micro_policy_loss(config, counts, logprobs.logprob_R, micro, entropy_R=logprobs.entropy_R)
        total, metrics = total + policy, metrics | of_policy
        if config.value_coef > 0.0 and value_head is not None:
            share, of_value = value_loss(value_head(logprobs.hidden_RE), micro, counts, clip=config.value_clip)
            total, metrics = total + config.value_coef * share, metrics | of_value
        return total, metrics

    return loss


def micro_policy_loss(
    config: PolicyLossConfig, counts: Counts, logprob_R: Tensor, micro: MicroBatch, *, entropy_R: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """One micro-batch's share of `policy_loss`."""
    advantage_R = _column(micro, "advantage", "the policy loss")
    old_R = micro.columns["old_logprob"] if "old_logprob" in micro.columns else logprob_R.detach()
    log_ratio_R = logprob_R - old_R
    objective_R, is_clipped_R = surrogate(config, log_ratio_R, logprob_R, advantage_R, micro)
    metrics: Metrics = {}
    if config.correction.kind != "none":
        sampling_R = _column(micro, "sampling_logprob", f"correction {config.correction.kind!r}")
        correction_R = correction(config.correction, old_R - sampling_R, micro)
        objective_R = objective_R * correction_R
        metrics["correction"] = _metric(correction_R, micro, counts)
        metrics["masked_fraction"] = _metric((correction_R == 0).float(), micro, counts)
    policy_share = -aggregate(config, objective_R, micro, counts)
    total = policy_share
    if config.kl.coef > 0.0:
        reference_R = _column(micro, "reference_logprob", "the KL penalty")
        kl_R = kl_estimate(config.kl.estimator, logprob_R - reference_R)
        if not config.kl.in_reward:
            total = total + config.kl.coef * aggregate(config, kl_R, micro, counts)
        metrics["reference_kl"] = _metric(kl_R.detach(), micro, counts)
    if config.entropy_coef > 0.0:
        if entropy_R is None:
            raise ConfigError(f"entropy_coef={config.entropy_coef} needs entropies: call the learner with entropy=True")
        total = total - config.entropy_coef * aggregate(config, entropy_R, micro, counts)
    with torch.no_grad():
        metrics["policy_loss"] = policy_share.detach()
        metrics["clip_fraction"] = _metric(is_clipped_R.float(), micro, counts)
        metrics["old_kl"] = _metric(kl_estimate("k3", log_ratio_R.neg()), micro, counts)
        metrics["ratio_max"] = log_ratio_R.max().exp()
        if entropy_R is not None:
            metrics["entropy"] = _metric(entropy_R, micro, counts)
        if "sampling_logprob" in micro.columns:
            gap_R = old_R - micro.columns["sampling_logprob"]
            metrics["mismatch_kl"] = _metric(kl_estimate("k3", gap_R.neg()), micro, counts)
            metrics["mismatch_max"] = gap_R.abs().max()
    return total, metrics


def surrogate(
    config: PolicyLossConfig, log_ratio_R: Tensor, logprob_R: Tensor, advantage_R: Tensor, micro: MicroBatch
) -> tuple[Tensor, Tensor]:
    """(objective of each token, to be maximised; whether its ratio was clipped), both [R]. See `ClipConfig`."""
    clip = config.clip
    if clip.kind == "gmpo":
        sign_R = advantage_R.sign()
        signed_R = sign_R * log_ratio_R
        bounded_R = sign_R * signed_R.clamp(max=clip.high)
        return sequence_mean(bounded_R, micro).exp() * advantage_R, signed_R > clip.high
    if config.ratio == "sequence":
        log_ratio_R = sequence_mean(log_ratio_R, micro)
    ratio_R = log_ratio_R.exp()
    if clip.kind == "none":
        return ratio_R * advantage_R, torch.zeros_like(ratio_R, dtype=torch.bool)
    bounded_R = ratio_R.clamp(1.0 - clip.low, 1.0 + clip.high)
    if clip.kind == "cispo":
        return bounded_R.detach() * advantage_R * logprob_R, ratio_R != bounded_R
    objective_R = torch.minimum(ratio_R * advantage_R, bounded_R * advantage_R)
    is_clipped_R = objective_R < ratio_R * advantage_R
    if clip.dual:
        floor_R = clip.dual * advantage_R
        is_low_R = (advantage_R < 0) & (objective_R < floor_R)
        objective_R = torch.where(is_low_R, floor_R, objective_R)
        is_clipped_R = is_clipped_R | is_low_R
    return objective_R, is_clipped_R


@torch.no_grad()
def correction(config: CorrectionConfig, log_weight_R: Tensor, micro: MicroBatch) -> Tensor:
    """Weight [R] of each token, a constant; see `CorrectionConfig`. 0 where it is masked."""
    if config.level == "sequence":
        log_weight_R = micro.sequence_sum(log_weight_R)[micro.sequence_R]
    weight_R = log_weight_R.clamp(max=60.0).exp()
    if config.kind == "truncate":
        return weight_R.clamp(max=config.cap)
    is_kept_R = (weight_R >= config.floor) & (weight_R <= config.cap)
    return torch.where(is_kept_R, weight_R, 0.0)


def kl_estimate(estimator: str, x_R: Tensor) -> Tensor:
    """Schulman's estimators of KL(π ‖ q) at samples of π, x = log π − log q; see `KLConfig` for k1's gradient.

    >>> [round(float(kl_estimate(k, torch.tensor([0.5]))), 4) for k in ("k1", "k2", "k3")]
    [0.5, 0.125, 0.1065]
    """
    if estimator == "k3":
        return torch.expm1(-x_R) + x_R
    half_R = 0.5 * x_R * x_R
    return half_R if estimator == "k2" else x_R.detach() + half_R - half_R.detach()


def value_loss(value_R: Tensor, micro: MicroBatch, counts: Counts, *, clip: float = 0.0) -> tuple[Tensor, Metrics]:
    """½ mean over tokens of max((V − G)², (clip(V, V_old ± clip) − G)²), as PPO's reference implementation has it.

    Reads the columns "return" and, with a clip, "old_value".
    """
    return_R = _column(micro, "return", "the value loss")
    error_R = (value_R - return_R) ** 2
    if clip > 0.0:
        old_R = _column(micro, "old_value", "the clipped value loss")
        bounded_R = old_R + (value_R - old_R).clamp(-clip, clip)
        error_R = torch.maximum(error_R, (bounded_R - return_R) ** 2)
    share = 0.5 * _token_mean(error_R, micro, counts)
    return share, {"value_loss": share.detach(), "value": _token_mean(value_R.detach(), micro, counts)}


def aggregate(config: PolicyLossConfig, values_R: Tensor, micro: MicroBatch, counts: Counts) -> Tensor:
    """This micro-batch's share of the batch's mean; see `PolicyLossConfig.aggregation`."""
    if config.aggregation == "tokens":
        return (values_R * micro.weight_R).sum() / counts.tokens
    if config.aggregation == "fixed":
        return (values_R * micro.weight_R).sum() / (counts.sequences * config.max_length)
    per_token_R = micro.weight_R / micro.sequence_sum(micro.weight_R)[micro.sequence_R]
    return (values_R * per_token_R).sum() / counts.sequences


def sequence_mean(values_R: Tensor, micro: MicroBatch) -> Tensor:
    """Weighted mean over each sequence's tokens, at every one of them: [R] -> [R]."""
    mean_S = micro.sequence_sum(values_R * micro.weight_R) / micro.sequence_sum(micro.weight_R).clamp(min=1e-30)
    return mean_S[micro.sequence_R]


def _metric(values_R: Tensor, micro: MicroBatch, counts: Counts) -> Tensor:
    """This micro-batch's share of the mean over the tokens that are computed."""
    return (values_R * micro.weight_R).sum() / (counts.measured or counts.tokens)


def _token_mean(values_R: Tensor, micro: MicroBatch, counts: Counts) -> Tensor:
    return (values_R * micro.weight_R).sum() / counts.tokens


def _column(micro: MicroBatch, name: str, user: str) -> Tensor:
    if name not in micro.columns:
        raise ConfigError(f"{user} reads the column {name!r}; the batch has {sorted(micro.columns)}")
    return micro.columns[name]
