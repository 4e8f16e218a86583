"""From groups to examples: which old policy a ratio is to; and settings that make no sense together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockstep.core.errors import ConfigError
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool
from lockstep.rl.lm.algorithms import ALGORITHMS, CorrectionConfig
from lockstep.rl.lm.batch import LearnConfig, make_batch
from lockstep.rl.lm.rollout import RolloutConfig
from tests.rl.lm.digits import Digits
from tests.rl.lm.small import config, run
from tests.rl.lm.test_faults import rollouts

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
        ("dr_grpo", {}, r"learn\.loss\.max_length=0; .* rollout\.max_tokens=5"),
        ("dapo", {"rollout__max_tokens": 96}, "a model of 96 positions leaves no room"),
        ("dapo", {"learn__micro_tokens": 5}, r"learn\.micro_tokens=5 holds no prompt"),
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
