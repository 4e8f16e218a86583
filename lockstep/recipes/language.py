"""Language models by reinforcement, small enough for a laptop: new models on reasoning-gym's problems."""

from __future__ import annotations

from dataclasses import replace

from lockstep.envs.lm.make import TaskConfig
from lockstep.envs.lm.verify import VerifierConfig
from lockstep.learn.adapter import AdapterConfig
from lockstep.learn.learner import LearnerConfig
from lockstep.learn.model import ModelConfig
from lockstep.learn.optimiser import OptimiserConfig, ScheduleConfig
from lockstep.learn.session import UpdatesConfig
from lockstep.rl.lm.algorithms import ALGORITHMS, CorrectionConfig
from lockstep.rl.lm.batch import LearnConfig
from lockstep.rl.lm.evaluate import EvaluationConfig
from lockstep.rl.lm.grpo import GRPOConfig
from lockstep.rl.lm.rollout import RolloutConfig
from lockstep.rl.lm.start import StartConfig
from lockstep.rl.lm.teacher import TeacherConfig


def _recipe(
    name: str, options: dict[str, bool | int | float | str], start: int, updates: int, max_tokens: int
) -> GRPOConfig:
    """A new model of 0.9M parameters: a supervised start of so many steps, then so many updates."""
    schedule = ScheduleConfig(kind="linear", warmup_steps=10, final=0.1)
    falling = ScheduleConfig(kind="linear", final=0.1)
    warm = LearnerConfig(optimiser=OptimiserConfig(kind="muon", lr=3e-3, muon_lr=0.02, schedule=schedule))
    return GRPOConfig(
        task=TaskConfig(name=name, options=options),
        model=ModelConfig(width=128, hidden=384, num_layers=4, num_heads=4, vocab_size=300, max_context=256),
        start=StartConfig(steps=start, batch=128, learner=warm),
        rollout=RolloutConfig(groups=64, group_size=8, max_tokens=max_tokens),
        verifier=VerifierConfig(workers=0),
        learn=LearnConfig(minibatches=2),
        learner=LearnerConfig(optimiser=OptimiserConfig(kind="muon", lr=2e-4, muon_lr=2e-3, schedule=falling)),
        evaluation=EvaluationConfig(problems=256, samples=4, temperature=1.0),
        run=UpdatesConfig(total_steps=updates, eval_every=25),
    )


def spell_backward() -> GRPOConfig:
    """Words spelled backward, by GRPO with DAPO's loss: a new 0.9M-parameter model, for minutes on two cores."""
    return _recipe("spell_backward", {"max_word_len": 7}, start=60, updates=130, max_tokens=10)


def chain_sum() -> GRPOConfig:
    """Sums and differences of two or three digits, by GRPO: a new 0.9M-parameter model."""
    options: dict[str, bool | int | float | str] = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    base = _recipe("chain_sum", options, start=120, updates=150, max_tokens=8)
    # Smaller steps: at twice the size the score falls before it rises.
    optimiser = replace(base.learner.optimiser, lr=1e-4, muon_lr=1e-3)
    return replace(base, learner=replace(base.learner, optimiser=optimiser))


def letter_counting() -> GRPOConfig:
    """How often a letter stands in a few words, by GRPO: a new 0.9M-parameter model."""
    return _recipe("letter_counting", {"min_words": 2, "max_words": 4}, start=60, updates=100, max_tokens=6)


def task() -> GRPOConfig:
    """Any task, by GRPO: give --task.name (FILE.jsonl, code:FILE.jsonl, textarena:GAME, my_module:MyTask) and --model.path."""
    return GRPOConfig(
        task=TaskConfig(name="train.jsonl"),
        model=ModelConfig(width=128, hidden=384, num_layers=4, num_heads=4, vocab_size=512, max_context=1024),
        rollout=RolloutConfig(groups=16, group_size=8, max_tokens=256),
        learn=LearnConfig(minibatches=2),
        learner=LearnerConfig(
            optimiser=OptimiserConfig(lr=1e-6, schedule=ScheduleConfig(kind="constant", warmup_steps=5))
        ),
        evaluation=EvaluationConfig(problems=128),
        run=UpdatesConfig(total_steps=200, eval_every=50),
    )


def _by(algorithm: str) -> GRPOConfig:
    base, loss = spell_backward(), ALGORITHMS[algorithm]
    if loss.aggregation == "fixed":
        loss = replace(loss, max_length=base.rollout.max_tokens)
    rollout = replace(base.rollout, greedy_baseline=loss.advantage == "greedy_baseline")
    return replace(base, learn=replace(base.learn, loss=loss), rollout=rollout)


def ppo_spell_backward() -> GRPOConfig:
    """Words spelled backward, by proximal policy optimisation with a value head."""
    return _by("ppo")


def grpo_kl_spell_backward() -> GRPOConfig:
    """Words spelled backward, by GRPO as in its paper: a mean for each answer, a penalty towards the model as it began."""
    return _by("grpo")


def dr_grpo_spell_backward() -> GRPOConfig:
    """Words spelled backward, by Dr.GRPO: no division by deviation or length."""
    return _by("dr_grpo")


def dapo_spell_backward() -> GRPOConfig:
    """Words spelled backward, by DAPO: a higher upper clip, the mean over tokens; what grpo-spell-backward does."""
    return _by("dapo")


def rloo_spell_backward() -> GRPOConfig:
    """Words spelled backward, by RLOO: each sample against the mean of its group's others."""
    return _by("rloo")


def reinforce_pp_spell_backward() -> GRPOConfig:
    """Words spelled backward, by REINFORCE++: advantages whitened over the batch."""
    return _by("reinforce_pp")


def remax_spell_backward() -> GRPOConfig:
    """Words spelled backward, by ReMax: the greedy answer's reward as baseline."""
    return _by("remax")


def gspo_spell_backward() -> GRPOConfig:
    """Words spelled backward, by GSPO: ratios of whole sequences."""
    return _by("gspo")


def cispo_spell_backward() -> GRPOConfig:
    """Words spelled backward, by CISPO: clipped weights, no clipped updates."""
    return _by("cispo")


def gmpo_spell_backward() -> GRPOConfig:
    """Words spelled backward, by GMPO: geometric means of clipped ratios."""
    return _by("gmpo")


def maxrl_spell_backward() -> GRPOConfig:
    """Words spelled backward, by MaxRL: towards the likelihood of right answers."""
    return _by("maxrl")


def pass_at_k_spell_backward() -> GRPOConfig:
    """Words spelled backward, by the gradient of pass@4."""
    return _by("pass_at_k")


def lora_spell_backward() -> GRPOConfig:
    """Words spelled backward, by a low-rank adapter beside the frozen model; its optimiser is AdamW."""
    return replace(
        spell_backward(),
        adapter=AdapterConfig(rank=16, alpha=32.0),
        learner=LearnerConfig(optimiser=OptimiserConfig(lr=3e-4)),
    )


def int8_spell_backward() -> GRPOConfig:
    """Words spelled backward, sampled from int8 copies of the weights, with truncated importance weights."""
    base = spell_backward()
    loss = replace(base.learn.loss, correction=CorrectionConfig(kind="truncate"))
    return replace(base, rollout=replace(base.rollout, dtype="int8"), learn=replace(base.learn, loss=loss, exact=False))


def distill_spell_backward() -> GRPOConfig:
    """Words spelled backward, learned of a teacher at the student's own samples: give --teacher.path a run or a model."""
    base = _by("distill")
    falling = ScheduleConfig(kind="linear", warmup_steps=5, final=0.1)
    return replace(
        base,
        model=replace(base.model, width=96, hidden=288, num_heads=3),
        teacher=TeacherConfig(references=32),
        rollout=replace(base.rollout, groups=32, group_size=4),
        learn=replace(base.learn, minibatches=1),
        learner=LearnerConfig(optimiser=OptimiserConfig(kind="muon", lr=2e-3, muon_lr=0.02, schedule=falling)),
        run=replace(base.run, total_steps=200, eval_every=50),
    )
