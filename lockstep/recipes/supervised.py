"""Recipes that learn from files of JSON lines: answers, comparisons, labels, a teacher."""

from __future__ import annotations

from lockstep.learn.data import DataConfig
from lockstep.learn.distill import DistillConfig
from lockstep.learn.learner import LearnerConfig
from lockstep.learn.optimiser import OptimiserConfig, ScheduleConfig
from lockstep.learn.preference import Method, PreferenceConfig
from lockstep.learn.reward_model import RewardModelConfig
from lockstep.learn.session import UpdatesConfig
from lockstep.learn.sft import SFTConfig


def _learner(lr: float) -> LearnerConfig:
    return LearnerConfig(optimiser=OptimiserConfig(lr=lr, schedule=ScheduleConfig(kind="cosine", warmup_steps=10)))


def sft_jsonl() -> SFTConfig:
    """Supervised fine-tuning on JSON lines: give --data.path and --model.path (or a new model's sizes)."""
    return SFTConfig(data=DataConfig(path="train.jsonl"), learner=_learner(1e-5), run=UpdatesConfig(total_steps=1000))


def reward_jsonl() -> RewardModelConfig:
    """Reward model from comparisons in JSON lines: give --data.path and --model.path."""
    return RewardModelConfig(
        data=DataConfig(path="pairs.jsonl"), learner=_learner(1e-5), run=UpdatesConfig(total_steps=1000)
    )


def distill_jsonl() -> DistillConfig:
    """Distillation of a teacher on the answers of JSON lines: give --teacher, --data.path and --model.path."""
    return DistillConfig(
        data=DataConfig(path="train.jsonl"), learner=_learner(1e-5), run=UpdatesConfig(total_steps=1000)
    )


def _preference(method: Method, lr: float, beta: float = 0.1) -> PreferenceConfig:
    path = "labels.jsonl" if method == "kto" else "pairs.jsonl"
    return PreferenceConfig(
        method=method,
        beta=beta,
        data=DataConfig(path=path),
        learner=_learner(lr),
        run=UpdatesConfig(total_steps=1000),
    )


def dpo_jsonl() -> PreferenceConfig:
    """Direct preference optimisation on pairs in JSON lines: give --data.path and --model.path."""
    return _preference("dpo", 1e-6)


def ipo_jsonl() -> PreferenceConfig:
    """Identity preference optimisation on pairs in JSON lines: give --data.path and --model.path."""
    return _preference("ipo", 1e-6)


def kto_jsonl() -> PreferenceConfig:
    """Kahneman-Tversky optimisation on labelled answers in JSON lines: give --data.path and --model.path."""
    return _preference("kto", 1e-6)


def orpo_jsonl() -> PreferenceConfig:
    """Odds-ratio preference optimisation on pairs in JSON lines: give --data.path and --model.path."""
    return _preference("orpo", 5e-6)


def simpo_jsonl() -> PreferenceConfig:
    """Simple preference optimisation on pairs in JSON lines: give --data.path and --model.path."""
    return _preference("simpo", 1e-6, beta=2.0)
