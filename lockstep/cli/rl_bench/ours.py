"""Our side: `python -m lockstep.cli.rl_bench.ours`, whose first line of stdin is a `Plan`; then a step for each line.

The loop is the one that `lockstep train` runs: it waits for the next line where it reports an update.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.core.errors import InputError
from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.make import TaskConfig
from lockstep.envs.lm.task import Task
from lockstep.envs.lm.verify import VerifierConfig
from lockstep.learn.learner import LearnerConfig
from lockstep.learn.model import ModelConfig
from lockstep.learn.optimiser import OptimiserConfig
from lockstep.learn.session import Session, UpdatesConfig
from lockstep.rl.lm import grpo
from lockstep.rl.lm.algorithms import ALGORITHMS
from lockstep.rl.lm.batch import LearnConfig
from lockstep.rl.lm.evaluate import EvaluationConfig
from lockstep.rl.lm.grpo import GRPOConfig
from lockstep.rl.lm.rollout import RolloutConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What both sides do."""

    model: str
    """Folder."""
    prompts: str
    """JSON-lines file of {"prompt"}; each step takes the next `groups` of them."""
    groups: int
    group_size: int
    max_tokens: int
    threads: int
    lr: float


class Letters(Task):
    """A made-up task whose rewards differ from sample to sample: the share of letters that are vowels."""

    def __init__(self, split: str = "train", seed: int = 0, path: str = "") -> None:
        with open(path) as file:
            self._prompts = [json.loads(line)["prompt"] for line in file]
        self._first = len(self._prompts) // 2 if split == "held_out" else 0

    @property
    def name(self) -> str:
        return "letters"

    @property
    def num_problems(self) -> int | None:
        return len(self._prompts) // 2

    def problem(self, index: int) -> Problem:
        return Problem(index=index, prompt=self._prompts[self._first + index])

    def score(self, problem: Problem, text: str) -> Score:
        return Score.of(vowels(text))


def vowels(text: str) -> float:
    """The share of vowels; the peer computes the same."""
    return sum(letter in "aeiou" for letter in text) / max(len(text), 1)


def config_of(plan: Plan) -> GRPOConfig:
    """The peer's settings in our words: one AdamW step of a clipped surrogate a batch, the mean over tokens."""
    return GRPOConfig(
        task=TaskConfig(name=f"{__name__}:Letters", options={"path": plan.prompts}, partial_credit="always"),
        model=ModelConfig(path=plan.model),
        rollout=RolloutConfig(
            groups=plan.groups, group_size=plan.group_size, max_tokens=plan.max_tokens, memory_mb=256
        ),
        verifier=VerifierConfig(workers=0),
        learn=LearnConfig(loss=ALGORITHMS["dapo"]),
        learner=LearnerConfig(optimiser=OptimiserConfig(lr=plan.lr)),
        evaluation=EvaluationConfig(problems=1),
        run=UpdatesConfig(total_steps=1 << 30, threads=plan.threads),
    )


def main() -> int:
    config = config_of(Plan(**json.loads(sys.stdin.readline())))
    began = began_cpu = 0.0

    def wait() -> None:
        nonlocal began, began_cpu
        if not sys.stdin.readline():
            sys.exit(0)
        began, began_cpu = time.perf_counter(), time.process_time()

    def report(step: int, total: int, metrics: Mapping[str, float]) -> None:
        if "learn_s" not in metrics:
            if step > 0:
                raise InputError("an update had no gradient; the figures would be of nothing")
            # The evaluation before the first update: from here on steps are asked for.
            wait()
            return
        seconds = time.perf_counter() - began
        answer = {
            "step_s": seconds,
            "cpu_s": time.process_time() - began_cpu,
            "rollout_s": metrics["rollout_s"],
            "learn_s": metrics["learn_s"],
            "tokens": metrics["length"] * config.rollout.groups * config.rollout.group_size,
        }
        print(json.dumps(answer), flush=True)
        wait()

    with Session(config.run, on_progress=report) as session:
        grpo.train(config, session)
    return 0


if __name__ == "__main__":
    from lockstep.cli.rl_bench import ours  # under its own name, by which the task is found

    sys.exit(ours.main())
