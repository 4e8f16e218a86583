"""Supervised, preference, reward and distillation losses: value and gradient do not depend on how a batch is cut.

The learner of language models has no data-parallel ranks of its own. What they would need is shown here: each rank's share
divides by the counts of the whole batch, so that gradients only have to be added.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lockstep.learn.distill import DistillConfig, divergence_loss
from lockstep.learn.heads import ScalarHead
from lockstep.learn.learner import Learner, LearnerConfig, Loss
from lockstep.learn.losses import likelihood_loss
from lockstep.learn.packing import Example, micro_batches
from lockstep.learn.preference import WITH_REFERENCE, PreferenceConfig, labelled_loss, pair_loss, with_reference
from lockstep.learn.reward_model import at_the_end, comparison_loss
from tests.learn.tiny import examples, tiny

PAIRS = 6
Batch = list[tuple[Example, Example, bool]]
"""Two answers, and whether the first one is good."""


class Case(NamedTuple):
    """A loss over a share of a batch of `num` rows and `num_tokens` learned tokens."""

    loss: Callable[[Learner, Batch, int, float], Loss]
    parts: Callable[[Batch], list[Example]]
    together: int = 1
    has_reference: bool = False


def preferences(method: str) -> Case:
    config = PreferenceConfig(method=method, beta=0.7, tau=0.3, label_smoothing=0.1)  # type: ignore[arg-type]
    return Case(lambda learner, share, num, tokens: pair_loss(config, num), both, 2, method in WITH_REFERENCE)


def both(share: Batch) -> list[Example]:
    return [one for first, second, _ in share for one in (first, second)]


def firsts(share: Batch) -> list[Example]:
    return [first for first, _, _ in share]


def distilled(kind: str) -> Case:
    config = DistillConfig(divergence=kind, temperature=1.3, beta=0.3, likelihood_weight=0.2)  # type: ignore[arg-type]
    teacher = tiny(seed=99)
    return Case(lambda learner, share, num, tokens: divergence_loss(config, learner.model, teacher, tokens), firsts)


def rewarded(learner: Learner, share: Batch, num: int, tokens: float) -> Loss:
    head = learner.heads["reward"]
    assert isinstance(head, ScalarHead)
    return comparison_loss(head, num, 0.05)


KTO = PreferenceConfig(method="kto", beta=0.7, good_weight=1.5)
CASES = {
    "sft": Case(lambda learner, share, num, tokens: likelihood_loss(tokens), firsts),
    **{method: preferences(method) for method in ("dpo", "ipo", "orpo", "simpo")},
    "kto": Case(
        lambda learner, share, num, tokens: labelled_loss(KTO, [good for _, _, good in share], 0.4, num),
        firsts,
        has_reference=True,
    ),
    "reward": Case(rewarded, lambda share: [at_the_end(one) for one in both(share)], 2),
    **{kind: distilled(kind) for kind in ("forward_kl", "reverse_kl", "jsd")},
}


def summed(case: Case, ranks: Sequence[Batch], max_tokens: int) -> dict[str, Tensor]:
    """Loss and gradients, each the sum over ranks that have micro-batches of their own."""
    head = ScalarHead(32)
    head.fill_random(torch.Generator().manual_seed(1), 0.3)
    learner = Learner(tiny(), LearnerConfig(), heads={"reward": head})
    num = sum(len(share) for share in ranks)
    tokens = sum(float(one.weight.sum()) for share in ranks for one in firsts(share))
    sums: dict[str, Tensor] = {}
    for share in ranks:
        micros = micro_batches(case.parts(share), max_tokens, together=case.together)
        micros = with_reference(micros, tiny(seed=8) if case.has_reference else None)
        total, metrics = learner.accumulate(micros, case.loss(learner, share, num, tokens))
        found = {name: p.grad for name, p in learner.named_parameters().items() if p.grad is not None}
        found |= {"loss": torch.tensor(total)} | {name: torch.tensor(value) for name, value in metrics.items()}
        sums |= {name: sums.get(name, 0.0) + value for name, value in found.items()}
    return sums


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_do_not_depend_on_packing_micro_batch_or_ranks(name: str) -> None:
    made = [Example(tokens=one.tokens, weight=one.weight) for one in examples(2 * PAIRS, seed=3)]
    batch = [(made[2 * row], made[2 * row + 1], row % 3 > 0) for row in range(PAIRS)]
    case = CASES[name]
    whole = summed(case, [batch], 10_000)
    assert any(float(value.abs().max()) > 1e-3 for value in whole.values())
    shuffled = random.Random(1).sample(batch, PAIRS)
    for ranks, max_tokens in (([batch], 70), ([shuffled], 90), ([batch[:2], batch[2:]], 80), ([shuffled, []], 10_000)):
        other = summed(case, ranks, max_tokens)
        assert set(other) == set(whole)
        for key, value in whole.items():
            # A gradient that all but cancels is rounded like the terms of its sum, whose size is that of its neighbours.
            atol = max(2e-6, 1e-6 * float(value.abs().max()))
            torch.testing.assert_close(other[key], value, rtol=2e-4, atol=atol, msg=f"{key} of {max_tokens}")
