"""A run of a few updates of a tiny model on single digits, and a task that needs no package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lockstep.api import override
from lockstep.core.errors import StoppedError
from lockstep.envs.lm.make import TaskConfig
from lockstep.envs.lm.verify import VerifierConfig
from lockstep.learn.learner import LearnerConfig
from lockstep.learn.model import ModelConfig
from lockstep.learn.optimiser import OptimiserConfig
from lockstep.learn.session import Result, Session, UpdatesConfig
from lockstep.rl.lm import grpo
from lockstep.rl.lm.algorithms import ALGORITHMS
from lockstep.rl.lm.batch import LearnConfig
from lockstep.rl.lm.evaluate import EvaluationConfig
from lockstep.rl.lm.grpo import GRPOConfig
from lockstep.rl.lm.rollout import RolloutConfig
from lockstep.rl.lm.start import StartConfig
from lockstep.runs.directory import RunDirectory
from lockstep.runs.sink import MemorySink


def config(loss: str = "dapo", **changes: Any) -> GRPOConfig:
    """Four updates; partial credit, so that groups differ."""
    made = GRPOConfig(
        task=TaskConfig(name="tests.rl.lm.digits:Digits", partial_credit="always"),
        model=ModelConfig(width=32, hidden=64, num_layers=2, num_heads=2, vocab_size=280, max_context=96),
        start=StartConfig(steps=3, batch=8, learner=LearnerConfig(optimiser=OptimiserConfig(lr=3e-3))),
        rollout=RolloutConfig(groups=3, group_size=4, max_tokens=5, memory_mb=16, max_sequences=16),
        verifier=VerifierConfig(workers=0),
        learn=LearnConfig(loss=ALGORITHMS[loss]),
        learner=LearnerConfig(optimiser=OptimiserConfig(lr=1e-3)),
        evaluation=EvaluationConfig(problems=6),
        run=UpdatesConfig(total_steps=4, threads=1, checkpoint_every=1, tensorboard=False),
    )
    for name, value in changes.items():
        made = override(made, name.replace("__", "."), value)
    return made


def run(wish: GRPOConfig, directory: RunDirectory | None = None, *, resume: bool = False) -> tuple[Result, list[Any]]:
    """(what came out, metrics without times)."""
    sink = MemorySink()
    session = Session(wish.run, directory=directory, sink=None if directory else sink, resume=resume)
    with session:
        result = grpo.train(wish, session)
    return result, [(step, untimed(line)) for step, line in sink.records]


def untimed(line: dict[str, float]) -> dict[str, float]:
    """Numbers that a repeated run must repeat."""
    return {name: value for name, value in line.items() if not name.endswith(("_s", "cached"))}


def folder(root: Path, wish: GRPOConfig) -> RunDirectory:
    return RunDirectory.create(root, "tiny", wish, wish.run.seed)


def stopped(root: Path, wish: GRPOConfig, step: int = 2) -> RunDirectory:
    """A run that was told to stop after so many updates, and did."""
    parts = folder(root, wish)

    def stop(done: int, *_: object) -> None:
        session.stop_requested = done == step

    session = Session(wish.run, directory=parts, on_progress=stop)
    with parts, pytest.raises(StoppedError, match=f"step {step}"), session:
        grpo.train(wish, session)
    return parts
