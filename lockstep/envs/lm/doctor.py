"""Looking at a task before a model is trained on it: is the reference answer right, is garbage wrong, how fast is it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lockstep.core.errors import ConfigError
from lockstep.core.trajectory import Problem, Score, Verdict
from lockstep.envs.lm.task import Task
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool

GARBAGE = ("", "zzz", "-987654321")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "warning", "problem"]
    what: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """What the doctor found.

    >>> report = TaskReport(name="t", findings=(Finding(level="ok", what="reference", detail="20 of 20 score 1"),))
    >>> print(report)
    Task t
      ok       reference  20 of 20 score 1
    """

    name: str
    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """No problem was found."""
        return all(finding.level != "problem" for finding in self.findings)

    def __str__(self) -> str:
        width = max(len(finding.what) for finding in self.findings)
        rows = [f"  {finding.level:<8} {finding.what:<{width}}  {finding.detail}" for finding in self.findings]
        return "\n".join([f"Task {self.name}", *rows])


def diagnose(task: Task, *, num_problems: int = 20, config: VerifierConfig | None = None) -> TaskReport:
    """Sample problems, score their reference answers and garbage in a worker, as training would, and measure rates.

    Args:
        task: any single-turn task.
        num_problems: how many to sample from its beginning.
        config: of the verifier pool.

    Raises:
        EnvError, DeadlineError: the task cannot be loaded by a worker.
    """
    if num_problems < 1:
        raise ConfigError(f"num_problems={num_problems}; expected 1 or more")
    count = num_problems if task.num_problems is None else min(num_problems, task.num_problems)
    started = time.perf_counter()
    problems = [task.problem(index) for index in range(count)]
    generated_s = time.perf_counter() - started
    with VerifierPool(
        replace(config or VerifierConfig(), workers=max(1, (config or VerifierConfig()).workers))
    ) as pool:
        answered = [problem for problem in problems if problem.answer]
        references = pool.score_all(task, [(problem, problem.answer) for problem in answered])
        started = time.perf_counter()
        texts = [(problem, text) for problem in problems for text in GARBAGE if text != problem.answer.strip()]
        garbage = pool.score_all(task, texts)
        judged_s = time.perf_counter() - started
    return TaskReport(
        name=task.name,
        findings=(
            _same_again(task, problems),
            _references(answered, references, count),
            _garbage(texts, garbage),
            Finding(level="ok", what="generating", detail=f"{1e3 * generated_s / count:.2f} ms a problem"),
            _speed(1e3 * judged_s / max(1, len(texts))),
        ),
    )


def _same_again(task: Task, problems: Sequence[Problem]) -> Finding:
    changed = [problem.index for problem in reversed(problems) if task.problem(problem.index) != problem]
    if changed:
        detail = f"problems {changed[:5]} are others when asked again; a run could not be resumed"
        return Finding(level="problem", what="same again", detail=detail)
    return Finding(level="ok", what="same again", detail=f"{len(problems)} problems are a function of their index")


def _references(problems: Sequence[Problem], scores: Sequence[Score], count: int) -> Finding:
    if not problems:
        detail = "no problem has a reference answer, so nothing shows that a right answer would be rewarded"
        return Finding(level="warning", what="reference", detail=detail)
    bad = [(p, s) for p, s in zip(problems, scores, strict=True) if not s.is_scored or s.value < 1]
    if bad:
        problem, score = bad[0]
        said = f"{score.value:g}" if score.is_scored else score.verdict.value
        why = f" ({score.detail})" if score.detail else ""
        detail = f"{len(bad)} of {len(problems)} score below 1: {problem.answer!r:.60} gets {said}{why}"
        return Finding(level="problem", what="reference", detail=detail)
    return Finding(level="ok", what="reference", detail=f"{len(problems)} of {count} score 1")


def _garbage(items: Sequence[tuple[Problem, str]], scores: Sequence[Score]) -> Finding:
    unscored = [(i, s) for i, s in zip(items, scores, strict=True) if not s.is_scored]
    if unscored:
        (problem, text), score = unscored[0]
        kind = "times out" if score.verdict is Verdict.TIMED_OUT else "raises"
        detail = f"the verifier {kind} at {len(unscored)} of {len(items)}, such as {text!r}: {score.detail:.120}"
        return Finding(level="problem", what="garbage", detail=detail)
    rewarded = [(i, s) for i, s in zip(items, scores, strict=True) if s.value >= 1]
    if rewarded:
        (problem, text), score = rewarded[0]
        detail = f"{len(rewarded)} of {len(items)} score 1 or more; problem {problem.index} gives {score.value:g} for {text!r}"
        return Finding(level="problem", what="garbage", detail=detail)
    mean = sum(score.value for score in scores) / max(1, len(scores))
    return Finding(level="ok", what="garbage", detail=f"{len(items)} texts score below 1, {mean:.3f} on average")


def _speed(ms: float) -> Finding:
    detail = f"{ms:.2f} ms an answer, one worker's start not counted"
    return Finding(level="warning" if ms > 100 else "ok", what="verifying", detail=detail)
