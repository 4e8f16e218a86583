"""Policy losses against their formulas, token by token in plain Python; and what they must not depend on."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lockstep.core.errors import ConfigError
from lockstep.learn.learner import Learner, LearnerConfig
from lockstep.learn.model import Teacher
from lockstep.learn.packing import Example, MicroBatch, micro_batches
from lockstep.rl.lm.algorithms import ALGORITHMS, ClipConfig, CorrectionConfig, KLConfig, PolicyLossConfig
from lockstep.rl.lm.losses import (
    Counts,
    correction,
    kl_estimate,
    micro_policy_loss,
    policy_loss,
    value_loss,
)
from lockstep.rl.lm.teacher import OnlineTeacher
from tests.learn.tiny import VOCAB, tiny

COLUMNS = ("advantage", "old_logprob", "sampling_logprob", "reference_logprob", "return", "old_value")


def batch(num: int, seed: int) -> list[Example]:
    """Sequences of one advantage each, with turns of others between the sampled tokens."""
    rng, made = random.Random(seed), []
    for _ in range(num):
        length = rng.randrange(3, 20)
        weight = [0.0, *(rng.choice((0.0, 1.0, 1.0)) for _ in range(length - 2)), 1.0]
        columns = {name: [rng.uniform(-3.0, -1.0) for _ in weight] for name in COLUMNS}
        columns["advantage"] = [rng.choice((-1.5, -0.5, 0.5, 2.0))] * length
        made.append(Example.of([rng.randrange(VOCAB) for _ in weight], weight=weight, columns=columns))
    return made


def one(num: int = 5, seed: int = 0) -> tuple[MicroBatch, Tensor, Counts]:
    examples = batch(num, seed)
    (micro,) = micro_batches(examples, 10_000)
    generator = torch.Generator().manual_seed(seed)
    logprob_R = micro.columns["old_logprob"] + 0.6 * torch.randn(micro.num_rows, generator=generator)
    return micro, logprob_R.requires_grad_(), Counts.of(examples)


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def naive(config: PolicyLossConfig, micro: MicroBatch, logprob_R: Tensor, counts: Counts) -> float:
    """The value of the policy loss and its KL penalty from the papers' formulas, without tensors."""
    sequences: dict[int, list[int]] = {}
    for r, s in enumerate(micro.sequence_R.tolist()):
        sequences.setdefault(s, []).append(r)
    column = {name: values.tolist() for name, values in micro.columns.items()}
    new, total, clip = logprob_R.tolist(), 0.0, config.clip
    for rows in sequences.values():
        logs = [new[r] - column["old_logprob"][r] for r in rows]
        values = []
        for r, log in zip(rows, logs, strict=True):
            a = column["advantage"][r]
            ratio = math.exp(sum(logs) / len(logs) if config.ratio == "sequence" else log)
            match clip.kind:
                case "none":
                    value = ratio * a
                case "ppo":
                    value = min(ratio * a, clamp(ratio, 1 - clip.low, 1 + clip.high) * a)
                    if clip.dual and a < 0:
                        value = max(value, clip.dual * a)
                case "cispo":
                    value = clamp(ratio, 1 - clip.low, 1 + clip.high) * a * new[r]
                case _:
                    sign = math.copysign(1.0, a)
                    bounded = [sign * min(sign * log, clip.high) for log in logs]
                    value = a * math.exp(sum(bounded) / len(bounded))
            gap = [column["old_logprob"][q] - column["sampling_logprob"][q] for q in rows]
            w = math.exp(sum(gap) if config.correction.level == "sequence" else gap[rows.index(r)])
            if config.correction.kind == "truncate":
                value *= min(w, config.correction.cap)
            elif config.correction.kind == "mask":
                value *= w if config.correction.floor <= w <= config.correction.cap else 0.0
            x = new[r] - column["reference_logprob"][r]
            kl = {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[config.kl.estimator]
            values.append(-value + config.kl.coef * kl)
        match config.aggregation:
            case "tokens":
                total += sum(values) / counts.tokens
            case "sequences":
                total += sum(values) / len(values) / counts.sequences
            case "fixed":
                total += sum(values) / config.max_length / counts.sequences
    return total


VARIANTS: dict[str, PolicyLossConfig] = {
    **{
        name: loss for name, loss in ALGORITHMS.items() if name != "distill"
    },  # its loss is no surrogate: test_teacher.py
    "dr_grpo": dataclasses.replace(ALGORITHMS["dr_grpo"], max_length=32),
    "dual": PolicyLossConfig(clip=ClipConfig(dual=1.3)),
    "truncated": PolicyLossConfig(correction=CorrectionConfig(kind="truncate", cap=1.2)),
    "masked": PolicyLossConfig(correction=CorrectionConfig(kind="mask", cap=1.5, floor=0.7)),
    "truncated sequence": PolicyLossConfig(correction=CorrectionConfig(kind="truncate", level="sequence")),
    "masked sequence": PolicyLossConfig(correction=CorrectionConfig(kind="mask", level="sequence", cap=5.0)),
    "k1": PolicyLossConfig(kl=KLConfig(estimator="k1", coef=0.3)),
    "k2": PolicyLossConfig(kl=KLConfig(estimator="k2", coef=0.3), aggregation="sequences"),
    "k3": PolicyLossConfig(kl=KLConfig(estimator="k3", coef=0.3)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_closed_form(name: str) -> None:
    for seed in range(3):
        micro, logprob_R, counts = one(seed=seed)
        loss, metrics = micro_policy_loss(VARIANTS[name], counts, logprob_R, micro)
        assert float(loss.detach()) == pytest.approx(naive(VARIANTS[name], micro, logprob_R.detach(), counts), rel=1e-5)
        assert all(math.isfinite(float(value)) and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("cispo", "k1", "reinforce_pp")])
def test_gradient_is_that_of_the_formula(name: str) -> None:
    """Against finite differences; cispo and k1 have a gradient of their own, below."""
    micro, logprob_R, counts = one(num=3)
    config, step = VARIANTS[name], 1e-4
    loss, _ = micro_policy_loss(config, counts, logprob_R, micro)
    (grad_R,) = torch.autograd.grad(loss, logprob_R)
    base = logprob_R.detach().double()
    for r in range(micro.num_rows):
        moved = [base.clone(), base.clone()]
        moved[0][r] += step
        moved[1][r] -= step
        up, down = (naive(config, micro, x, counts) for x in moved)
        assert float(grad_R[r]) == pytest.approx((up - down) / (2 * step), rel=2e-3, abs=2e-5), r


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    micro, logprob_R, counts = one()
    config = PolicyLossConfig(clip=ClipConfig(kind="cispo", low=0.1, high=0.1))
    loss, metrics = micro_policy_loss(config, counts, logprob_R, micro)
    (grad_R,) = torch.autograd.grad(loss, logprob_R)
    ratio_R = (logprob_R.detach() - micro.columns["old_logprob"]).exp()
    torch.testing.assert_close(grad_R, -ratio_R.clamp(0.9, 1.1) * micro.columns["advantage"] / counts.tokens)
    assert float(metrics["clip_fraction"]) > 0.5


def test_k1_has_the_gradient_of_k2() -> None:
    x = torch.tensor([0.7, -0.3], requires_grad=True)
    for estimator in ("k1", "k2"):
        (grad,) = torch.autograd.grad(kl_estimate(estimator, x).sum(), x)
        torch.testing.assert_close(grad, x.detach())


def test_kl_estimates_agree_in_the_mean_and_with_the_kl_gradient() -> None:
    """Over a whole vocabulary the expectations are sums: k1 and k3 are unbiased, k1's and k2's gradients exact."""
    logits, reference = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = logits.requires_grad_()
    logprob, q = logits.log_softmax(0), reference.log_softmax(0)
    p = logprob.exp().detach()
    exact = (logprob.exp() * (logprob - q)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(estimator, logprob - q)).sum(), exact)
    (slope,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for estimator in ("k1", "k2"):
        (found,) = torch.autograd.grad((p * kl_estimate(estimator, logprob - q)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, slope)


def test_on_policy_every_clip_has_the_policy_gradient() -> None:
    """Where π = π_old nothing is clipped and all surrogates have the gradient −A / normaliser."""
    micro, _, counts = one()
    logprob_R = micro.columns["old_logprob"].clone().requires_grad_()
    columns = {name: values for name, values in micro.columns.items() if name != "old_logprob"}
    for given in (micro, dataclasses.replace(micro, columns=columns)):
        for kind in ("none", "ppo", "cispo", "gmpo"):
            config = PolicyLossConfig(clip=ClipConfig(kind=kind))  # type: ignore[arg-type]
            if kind == "gmpo":
                config = dataclasses.replace(config, aggregation="sequences")
            (grad_R,) = torch.autograd.grad(micro_policy_loss(config, counts, logprob_R, given)[0], logprob_R)
            share_R = given.sequence_rows()[given.sequence_R] * counts.sequences if kind == "gmpo" else counts.tokens
            torch.testing.assert_close(grad_R, -given.columns["advantage"] / share_R)


def test_correction_weights() -> None:
    micro, _, _ = one()
    log_R = torch.randn(micro.num_rows)
    weight_R = correction(CorrectionConfig(kind="truncate", cap=1.0), log_R, micro)
    torch.testing.assert_close(weight_R, log_R.exp().clamp(max=1.0))
    weight_R = correction(CorrectionConfig(kind="mask", floor=0.5, cap=2.0), log_R, micro)
    assert set(weight_R[(log_R.exp() < 0.5) | (log_R.exp() > 2.0)].tolist()) <= {0.0}
    assert bool(torch.isfinite(correction(CorrectionConfig(kind="truncate"), log_R + 500.0, micro)).all())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 32))

    def forward(self, hidden_RE: Tensor) -> Tensor:
        return hidden_RE @ self.weight


def gradients(config: PolicyLossConfig, ranks: Sequence[Sequence[Example]], max_tokens: int) -> dict[str, Tensor]:
    """Sum of the gradients of some data-parallel ranks, each with its own micro-batches and global counts."""
    counts = sum((Counts.of(rank) for rank in ranks), Counts(0.0, 0))
    head = Head()
    learner = Learner(tiny(), LearnerConfig(), heads={"value": head} if config.value_coef else {})
    divergence = None
    if config.teacher.coef:
        teacher = Teacher(path="", model=tiny(seed=99), tokenizer=None, tokenizer_folder=None)  # type: ignore[arg-type]
        divergence = OnlineTeacher(teacher).divergence(learner, config.teacher)
    loss = policy_loss(config, counts, value_head=head if config.value_coef else None, divergence=divergence)
    sums: dict[str, Tensor] = {}
    for rank in ranks:
        total, found = learner.accumulate(micro_batches(rank, max_tokens), loss, entropy=True)
        shares = {name: p.grad for name, p in learner.named_parameters().items() if p.grad is not None}
        shares |= {"loss": torch.tensor(total), "policy_loss": torch.tensor(found["policy_loss"])}
        sums = {name: sums.get(name, 0.0) + share for name, share in shares.items()}
    return sums


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_loss_and_gradient_do_not_depend_on_packing_micro_batch_or_ranks(name: str) -> None:
    config = VARIANTS.get(name, ALGORITHMS[name])
    correct = CorrectionConfig(kind="truncate", level="sequence", cap=1.5)
    config = dataclasses.replace(config, entropy_coef=0.01, correction=correct)
    examples = batch(9, seed=3)
    whole = gradients(config, [examples], 10_000)
    shuffled = random.Random(1).sample(examples, 9)
    for ranks, max_tokens in (([examples], 20), ([shuffled], 45), ([examples[:2], examples[2:]], 30)):
        other = gradients(config, ranks, max_tokens)
        assert set(other) == set(whole)
        for key, value in whole.items():
            torch.testing.assert_close(other[key], value, rtol=2e-4, atol=2e-6, msg=f"{key} of {max_tokens}")


def test_value_loss_is_the_larger_of_two_errors() -> None:
    micro, _, counts = one()
    value_R = torch.randn(micro.num_rows)
    total = 0.0
    columns = (value_R, micro.columns["old_value"], micro.columns["return"])
    for v, old, g in torch.stack(columns, 1).tolist():
        total += 0.5 * max((v - g) ** 2, (old + clamp(v - old, -0.2, 0.2) - g) ** 2) / counts.tokens
    assert float(value_loss(value_R, micro, counts, clip=0.2)[0]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PolicyLossConfig(advantage="gae"),
        lambda: PolicyLossConfig(value_coef=0.5),
        lambda: policy_loss(PolicyLossConfig(aggregation="fixed"), Counts(1.0, 1)),
        lambda: policy_loss(ALGORITHMS["ppo"], Counts(1.0, 1)),
        lambda: ClipConfig(dual=0.5),
        lambda: ClipConfig(kind="clip"),  # type: ignore[arg-type]
        lambda: CorrectionConfig(floor=3.0),
        lambda: KLConfig(estimator="k4"),  # type: ignore[arg-type]
    ],
)
def test_compositions_that_make_no_sense(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


def test_a_missing_column_is_named() -> None:
    micro, logprob_R, counts = one()
    bare = dataclasses.replace(micro, columns={"advantage": micro.columns["advantage"]})
    config = PolicyLossConfig(correction=CorrectionConfig(kind="truncate"))
    with pytest.raises(ConfigError, match="sampling_logprob"):
        micro_policy_loss(config, counts, logprob_R, bare)
    with pytest.raises(ConfigError, match="entropy=True"):
        micro_policy_loss(PolicyLossConfig(entropy_coef=0.1), counts, logprob_R, micro)
