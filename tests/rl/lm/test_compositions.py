"""Every named composition through the one loop, on a model of one layer: exact, finite, and it changes the weights."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest

from lockstep.envs.lm.make import TaskConfig
from lockstep.envs.lm.verify import VerifierConfig
from lockstep.learn.learner import LearnerConfig
from lockstep.learn.model import ModelConfig
from lockstep.learn.optimiser import OptimiserConfig
from lockstep.learn.session import Session, UpdatesConfig
from lockstep.rl.lm.algorithms import ALGORITHMS
from lockstep.rl.lm.batch import LearnConfig
from lockstep.rl.lm.evaluate import EvaluationConfig
from lockstep.rl.lm.grpo import GRPOConfig, train
from lockstep.rl.lm.rollout import RolloutConfig
from lockstep.runs.sink import MemorySink

pytestmark = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="extra: reasoning")


def run(name: str, **rollout: object) -> MemorySink:
    loss = ALGORITHMS[name]
    if loss.aggregation == "fixed":
        loss = replace(loss, max_length=6)
    greedy = loss.advantage == "greedy_baseline"
    config = GRPOConfig(
        task=TaskConfig(name="letter_counting", options={"min_words": 1, "max_words": 2}),
        model=ModelConfig(width=32, hidden=32, num_layers=1, num_heads=1, vocab_size=261, max_context=256),
        rollout=RolloutConfig(groups=3, group_size=4, max_tokens=6, greedy_baseline=greedy, **rollout),  # type: ignore[arg-type]
        verifier=VerifierConfig(workers=0),
        learn=LearnConfig(loss=loss, minibatches=2),
        learner=LearnerConfig(optimiser=OptimiserConfig(lr=1e-3)),
        evaluation=EvaluationConfig(problems=2),
        run=UpdatesConfig(total_steps=2, threads=1),
    )
    sink = MemorySink()
    with Session(config.run, sink=sink) as session:
        train(config, session)
    return sink


@pytest.mark.parametrize("name", ["ppo", "grpo", "remax"])
def test_a_value_head_a_reference_and_a_baseline(name: str) -> None:
    sink = run(name)
    assert len(sink.records) == 2
    if name == "ppo":
        assert len(sink.series("value_loss")[1]) == 2
    if name == "grpo":
        values = sink.series("reference_kl")[1]
        assert values[0] == 0.0  # the reference is the model as it began
        assert all(value >= 0.0 for value in values)


def test_truncated_sampling_is_learned_exactly() -> None:
    """`exact` compares every fresh token's number with the sampler's, here of a truncated, heated distribution."""
    sink = run("ppo", temperature=0.8, top_k=20, top_p=0.9)
    assert sink.series("mismatch_max")[1][0] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"ppo", "grpo", "remax", "distill"}))
def test_every_other_composition(name: str) -> None:
    assert len(run(name).records) == 2
