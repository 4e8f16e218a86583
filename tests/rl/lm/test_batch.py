"""From groups to examples: which old policy a ratio is to; and settings that make no sense together."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.api import override
from lockstep.core.errors import ConfigError, EnvError, InputError
from lockstep.core.trajectory import Score
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool
from lockstep.learn.heads import ScalarHead
from lockstep.learn.learner import Learner, LearnerConfig
from lockstep.learn.model import build
from lockstep.rl.lm.algorithms import ALGORITHMS, CorrectionConfig, KLConfig
from lockstep.rl.lm.batch import LearnConfig, Update, make_batch
from lockstep.rl.lm.losses import Counts, micro_policy_loss
from lockstep.rl.lm.rollout import RolloutConfig
from tests.learn.conftest import write_rows
from tests.rl.lm.digits import Digits
from tests.rl.lm.small import config, run
from tests.rl.lm.test_faults import SMALL, rollouts

LATE, KIND = "learner__optimiser__schedule__warmup_steps", "learner__optimiser__schedule__kind"


def test_the_ratio_of_older_samples_is_to_their_sampler_unless_a_correction_is() -> None:
    with VerifierPool(VerifierConfig(workers=0)) as verifier:
        groups = rollouts(verifier, Digits()).collect(range(3))
    plain = LearnConfig(loss=ALGORITHMS["cispo"])
    corrected = LearnConfig(loss=replace(ALGORITHMS["cispo"], correction=CorrectionConfig(kind="truncate")))

    def columns(wish: LearnConfig, version: int) -> dict[str, Any]:
        (part, *_) = make_batch(groups, wish, RolloutConfig(), version).minibatches
        return dict(part.examples[0].columns)

    for wish in (plain, replace(plain, exact=False), replace(plain, minibatches=2)):
        stale = columns(wish, 1)
        assert stale["old_logprob"].equal(stale["sampling_logprob"])
    assert "old_logprob" not in columns(corrected, 1)
    # On-policy it is the learner's, which has the sampler's numbers where `exact` holds.
    assert "old_logprob" not in columns(plain, 0)
    assert "old_logprob" in columns(replace(plain, minibatches=2), 0)
    assert "old_logprob" not in columns(replace(plain, minibatches=2, exact=False), 0)


@pytest.mark.parametrize(
    ("loss", "changes", "says"),
    [
        ("dapo", {"rollout__group_size": 1}, r"rollout\.group_size=1 .* compares a sample with its group's others"),
        ("pass_at_k", {"rollout__group_size": 3}, r"rollout\.group_size=3 with learn\.loss\.k=4"),
        ("remax", {}, r"set rollout\.greedy_baseline=True"),
        ("maxrl", {"learn__overlong_buffer": 2}, r"learn\.overlong_buffer=2 makes rewards negative"),
        ("dapo", {"learn__overlong_buffer": 6}, r"learn\.overlong_buffer=6 of rollout\.max_tokens=5"),
        ("dr_grpo", {}, r"learn\.loss\.max_length=0; .* rollout\.max_tokens=5"),
        ("dapo", {"rollout__max_tokens": 96}, "a model of 96 positions leaves no room"),
        ("dapo", {"staleness": -1}, "staleness=-1"),
        ("dapo", {"learn__minibatches": 4}, r"learn\.minibatches=4 of rollout\.groups=3"),
        ("dapo", {"evaluation__level": 1}, "level=1 of task digits, which has no levels"),
        ("dapo", {f"start__{LATE}": 3, f"start__{KIND}": "linear"}, "3 optimiser steps in all with .*warmup_steps=3"),
        ("dapo", {LATE: 9, KIND: "cosine"}, "4 optimiser steps in all with .*warmup_steps=9"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused_before_anything_is_trained(
    loss: str, changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep.rl.lm.grpo.supervised_start", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=says):
        run(config(loss, **changes))


def test_metrics_are_means_over_what_is_computed_and_not_diluted_by_groups_without_a_gradient() -> None:
    with VerifierPool(VerifierConfig(workers=0)) as verifier:
        groups = rollouts(verifier, Digits()).collect(range(3))
    for one in groups[0].trajectories:
        one.score = Score.of(0.5)
    found = []
    for drop in (False, True):
        wish = LearnConfig(loss=ALGORITHMS["dapo"], drop_uniform=drop)
        learner = Learner(build(SMALL, ["say 1:"], 1, None).model, LearnerConfig(), total_steps=1)
        update = Update(learner, make_batch(groups, wish, RolloutConfig(), 0), wish)
        update.prepare()
        found.append(update.metrics)
    assert found[0]["entropy"] == pytest.approx(found[1]["entropy"])
    assert 4.0 < found[0]["entropy"] < 5.7  # of 270 tokens, nearly all alike: log 270 = 5.6


def test_answers_that_a_limit_cut_off_can_be_left_out_and_still_are_compared_with() -> None:
    with VerifierPool(VerifierConfig(workers=0)) as verifier:
        groups = rollouts(verifier, Digits()).collect(range(3))
    for group in groups:
        group.trajectories[0].is_truncated, group.trajectories[1].is_truncated = True, False
    whole, parts = (make_batch(groups, LearnConfig(drop_truncated=drop), RolloutConfig(), 0) for drop in (False, True))
    assert parts.advantages == whole.advantages
    assert {sample for _, sample in parts.minibatches[0].samples} == {1}
    assert {sample for _, sample in whole.minibatches[0].samples} == {0, 1}
    assert parts.minibatches[0].counts.sequences == 3


def test_a_penalty_in_the_reward_is_taken_off_each_tokens_return_and_not_in_the_loss() -> None:
    with VerifierPool(VerifierConfig(workers=0)) as verifier:
        groups = rollouts(verifier, Digits()).collect(range(3))
    model = build(SMALL, ["say 1:"], 1, None).model
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.3)
    loss = replace(ALGORITHMS["ppo"], gae_lambda=1.0, kl=KLConfig(coef=0.5, in_reward=True))
    wish = LearnConfig(loss=loss)
    learner = Learner(model, LearnerConfig(), heads={"value": ScalarHead(model.facts.width)}, total_steps=1)
    update = Update(learner, make_batch(groups, wish, RolloutConfig(), 0), wish, reference)
    update.prepare()
    (micro,) = update._packed[0]
    gap_R = micro.columns["sampling_logprob"] - micro.columns["reference_logprob"]
    assert float(gap_R.abs().max()) > 1e-3
    scores = [one.score.value for group in groups for one in group.trajectories if one.score]
    for sequence in range(micro.num_sequences):
        rows = micro.sequence_R == sequence
        to_go = gap_R[rows].flip(0).cumsum(0).flip(0)
        score = scores[micro.examples[sequence]]
        torch.testing.assert_close(micro.columns["return"][rows], score - 0.5 * to_go, atol=1e-5, rtol=1e-5)
    counts, logprob_R = Counts.of([*update._batch.minibatches[0].examples]), micro.columns["sampling_logprob"]
    of_both = [micro_policy_loss(one, counts, logprob_R, micro)[0] for one in (loss, replace(loss, kl=KLConfig()))]
    assert of_both[0] == of_both[1]
    with pytest.raises(ConfigError, match="in_reward=True with advantage='group_normalised'"):
        replace(ALGORITHMS["grpo"], kl=KLConfig(coef=0.1, in_reward=True))


def test_a_sample_longer_than_a_micro_batch_goes_alone() -> None:
    small = {"run__total_steps": 1, "start__steps": 0, "evaluation__problems": 2}
    _, whole = run(config(**small))
    _, alone = run(config(learn__micro_tokens=3, **small))
    assert alone[0][1]["loss"] == pytest.approx(whole[0][1]["loss"], abs=1e-6)
    assert alone[0][1]["grad_norm"] == pytest.approx(whole[0][1]["grad_norm"], rel=1e-4)


LONG = "".join(str((place * place + place // 7) % 10) for place in range(500))


def posed(index: int) -> str:
    return f"say {LONG * (index % 3 == 2)}{index % 5}:"


@pytest.mark.parametrize("workers", [0, 1])
def test_prompts_without_room_are_counted_and_the_others_learned_from(
    workers: int, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an endless task: every third one, also of the supervised start."""
    plain = Digits.problem
    monkeypatch.setattr(Digits, "problem", lambda self, i: replace(plain(self, i), prompt=posed(i * self._is_training)))
    _, found = run(config(run__total_steps=2, evaluation__problems=1, rollout__workers=workers))
    assert [line["too_long"] for _, line in found] == [1.0, 1.0]
    assert all(line["length"] > 0.0 for _, line in found)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (True, r"problem \d+ of task \w+ has a prompt of \d+ tokens, which leaves no room"),
        (False, "no prompt of update 1"),
    ],
)
def test_prompts_without_room_are_an_error_where_they_are_all_or_in_a_file(
    file: bool, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = config(start__steps=0, evaluation__problems=1)
    if file:
        rows = [{"question": f"{row}: " + LONG * (row == 7), "answer": "1"} for row in range(10)]
        path = write_rows(tmp_path / "rows.jsonl", rows)
        wish = override(override(wish, "task.name", path), "task.options", {"held_out_share": 0.2})
    else:
        plain = Digits.problem
        monkeypatch.setattr(
            Digits, "problem", lambda self, i: replace(plain(self, i), prompt=posed(2 * self._is_training))
        )
    with pytest.raises((EnvError, InputError), match=says):
        run(wish)
