from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockstep.api import override
from lockstep.core.errors import ConfigError
from lockstep.recipes import RECIPES, recipe
from lockstep.rl.algorithms import is_language, validated


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("clip", -1.0, "clip=-1.0; expected a number above 0"),
        ("gae_lambda", 1.5, "gae_lambda=1.5"),
        ("learning_rate", float("nan"), "learning_rate=nan; expected a finite number"),
        ("learning_rate", "fast", "learning_rate='fast'"),
        ("num_epochs", 1.5, "num_epochs=1.5; expected at least 1"),
        ("hidden_sizes", (64, 0), r"network.hidden_sizes=\(64, 0\)"),
        ("activation", "tanhh", "unknown network.activation 'tanhh'; did you mean 'tanh'"),
        ("threads", 0, "run.threads=0"),
        ("seed", -1, "run.seed=-1"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_name(field: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validated(override(recipe("ppo-cartpole"), field, value))


@pytest.mark.parametrize(
    ("name", "field", "value", "told"),
    [
        ("grpo-task", "rollout.groups", 0, "rollout.groups=0; expected at least 1"),
        ("grpo-task", "rollout.temperature", 0.0, "rollout.temperature=0.0; expected a number above 0"),
        ("grpo-task", "rollout.dtype", "int3", "unknown rollout.dtype 'int3'; did you mean 'int"),
        ("grpo-task", "learn.loss.entropy_coef", float("nan"), "entropy_coef=nan; expected a finite number"),
        ("grpo-task", "run.log_every", 0, "run.log_every=0; expected at least 1"),
        ("sft-jsonl", "run.threads", -1, "run.threads=-1; expected 0 or more"),
        ("sft-jsonl", "model.num_layers", 0, "model.num_layers=0"),
        ("kto-jsonl", "good_weight", -1.0, "good_weight=-1.0"),
    ],
)
def test_a_value_that_no_language_model_can_use_is_refused_by_its_name(
    name: str, field: str, value: Any, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        validated(override(recipe(name), field, value))


def test_fields_of_one_name_have_ranges_of_their_own() -> None:
    for field, value in (("evaluation.temperature", 0.0), ("verifier.memory_mb", 0), ("run.threads", 0)):
        validated(override(recipe("grpo-task"), field, value))


def test_every_recipe_is_within_the_ranges() -> None:
    for name in RECIPES:
        validated(recipe(name))


def test_no_value_is_a_value_that_passes() -> None:
    config = recipe("sac-pendulum")
    assert not is_language(config)
    assert validated(replace(config, temperature=None)).temperature is None
