"""Looking at a task before a model is trained on it: is the reference answer right, is garbage wrong, how fast is it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lockstep.core.errors import ConfigError
from lockstep.core.trajectory import Problem, Score, Verdict
from lockstep.envs.lm.task import EpisodeTask, Task, Turn
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


def diagnose_episodes(
    task: EpisodeTask, *, num_episodes: int = 8, max_turns: int = 8, config: VerifierConfig | None = None
) -> TaskReport:
    """Play episodes of garbage in a worker, as training would, play them again in another, and measure the rate.

    Args:
        num_episodes: how many, from the task's beginning.
        max_turns: after which an episode is left alone.
        config: of the verifier pool.

    Raises:
        EnvError, DeadlineError: the task cannot be loaded by a worker.
    """
    if num_episodes < 1 or max_turns < 1:
        raise ConfigError(f"num_episodes={num_episodes}, max_turns={max_turns}; expected 1 or more of each")
    count = num_episodes if task.num_problems is None else min(num_episodes, task.num_problems)
    config = replace(config or VerifierConfig(), workers=max(1, (config or VerifierConfig()).workers))
    problems = [task.problem(index) for index in range(count)]
    played: dict[int, tuple[str, ...]] = dict.fromkeys(range(count), ())
    last: dict[int, Turn | Score] = {}
    with VerifierPool(config) as pool:
        started = time.perf_counter()
        for number in range(max_turns):
            going = [index for index in played if not _is_over(last.get(index))]
            for index in going:
                played[index] += (GARBAGE[(index + number) % len(GARBAGE)],)
            last |= dict(zip(going, pool.step_all(task, [(index, played[index]) for index in going]), strict=True))
        seconds = time.perf_counter() - started
    with VerifierPool(config) as pool:
        again = dict(zip(played, pool.step_all(task, list(played.items())), strict=True))
    num_turns = sum(map(len, played.values()))
    return TaskReport(
        name=task.name,
        findings=(
            _same_again(task, problems),
            _steps(played, last),
            _replays(last, again),
            _speed(1e3 * seconds / num_turns),
        ),
    )


def _is_over(turn: Turn | Score | None) -> bool:
    return isinstance(turn, Score) or (turn is not None and turn.is_done)


def _steps(played: Mapping[int, Sequence[str]], last: Mapping[int, Turn | Score]) -> Finding:
    bad = [(index, turn) for index, turn in last.items() if isinstance(turn, Score)]
    if bad:
        index, score = bad[0]
        kind = "hangs" if score.verdict is Verdict.TIMED_OUT else "raises"
        why = f"episode {index} {kind} after {list(played[index])!r:.60}: {score.detail:.120}"
        detail = f"{len(bad)} of {len(last)} end without a reward; {why}"
        return Finding(level="problem", what="garbage", detail=detail)
    over = sum(turn.is_done for turn in last.values() if isinstance(turn, Turn))
    mean = sum(turn.reward for turn in last.values() if isinstance(turn, Turn)) / len(last)
    turns = max(map(len, played.values()))
    detail = f"{over} of {len(last)} episodes are over after {turns} turns at most, last rewards {mean:.3f} on average"
    return Finding(level="ok", what="garbage", detail=detail)


def _replays(last: Mapping[int, Turn | Score], again: Mapping[int, Turn | Score]) -> Finding:
    fair = [index for index, turn in last.items() if isinstance(turn, Turn)]
    other = [index for index in fair if last[index] != again[index]]
    if other:
        detail = f"episodes {other[:5]} answer the same texts otherwise when played again; a run could not be resumed"
        return Finding(level="problem", what="replay", detail=detail)
    return Finding(level="ok", what="replay", detail=f"{len(fair)} episodes are a function of their texts")


def _same_again(task: Task | EpisodeTask, problems: Sequence[Problem]) -> Finding:
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
    detail = f"{ms:.2f} ms an answer or turn, one worker's start not counted"
    return Finding(level="warning" if ms > 100 else "ok", what="verifying", detail=detail)
