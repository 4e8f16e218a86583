"""Levels follow from what was answered: in the loop, in its metrics and events, and the same after a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lockstep.checkpoint.state import state_from_json, state_to_json
from lockstep.core.errors import ConfigError
from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.make import TaskConfig, levelled, make_tasks
from lockstep.envs.lm.mixture import Curriculum, CurriculumConfig
from lockstep.envs.lm.task import level_index, split_index
from lockstep.rl.lm.course import Course
from lockstep.rl.lm.grpo import GRPOConfig
from lockstep.rl.lm.problems import ProblemSource
from lockstep.rl.lm.rollout import Group
from lockstep.runs.directory import RunDirectory
from lockstep.runs.jsonl import read_jsonl
from lockstep.runs.record import read_run
from tests.rl.lm.digits import Ladder
from tests.rl.lm.small import config, folder, run, untimed
from tests.rl.lm.test_faults import sampled


def climbing(**changes: Any) -> GRPOConfig:
    """A window is a batch."""
    wish = {
        "task__name": "tests.rl.lm.digits:Ladder",
        "task__levels": ("all",),
        "run__total_steps": 3,
        "start__steps": 0,
    }
    wish |= {
        "task__curriculum__window": 3,
        "task__curriculum__lower": 0.5,
        "evaluation__problems": 2,
        "evaluation__level": 2,
    }
    return config(**(wish | changes))


def posed(staleness: int = 0, stop: int = 6, **wishes: Any) -> tuple[list[int], Course]:
    """Levels of the problems of batches of three groups, each begun as early as it may."""
    task = TaskConfig(name="", levels=("all",), curriculum=CurriculumConfig(**({"window": 3, "lower": 0.5} | wishes)))
    ladder = Ladder()
    course = Course(ladder, task, ProblemSource(ladder, 5), 3, staleness)
    found, begun = [], {batch: batch_of(course, batch) for batch in range(staleness)}
    for batch in range(stop):
        begun[batch + staleness] = batch_of(course, batch + staleness)
        groups = [answered(ladder, number, problem) for number, problem in begun[batch]]
        (level,) = {split_index(group.problem.index)[0] for group in groups}
        assert course.metrics(groups) == {"level": level}
        found.append(level)
        course.observe(batch, groups)
    return found, course


def batch_of(course: Course, batch: int) -> list[tuple[int, Problem]]:
    return [(number, course.problem(number)) for number in range(3 * batch, 3 * batch + 3)]


def answered(task: Ladder, number: int, problem: Problem) -> Group:
    """One answer judged, and one whose verifier timed out."""
    scores = task.score(problem, ""), Score.timed_out("slept")
    return Group(number=number, problem=problem, trajectories=[replace(sampled(None), score=score) for score in scores])


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({}, [0, 1, 2, 1, 2, 1]),
        ({"highest": 1}, [0, 1, 1, 1, 1, 1]),
        ({"first": 2, "lower": 0.0}, [2, 2, 2, 2, 2, 2]),
        ({"window": 4}, [0, 0, 1, 1, 2, 2]),
        # A batch is posed by what is known when it may first begin: a version earlier.
        ({"staleness": 1}, [0, 0, 1, 1, 2, 2]),
        ({"staleness": 2}, [0, 0, 0, 1, 1, 1]),
    ],
)
def test_levels_rise_and_fall_with_success(wishes: dict[str, Any], expected: list[int]) -> None:
    assert posed(**wishes)[0] == expected


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_courses_state_is_plain_and_whole(staleness: int) -> None:
    course = posed(staleness, 4)[1]
    state, arrays = state_to_json(course.state_dict())
    again = posed(staleness, 0)[1]
    again.load_state_dict(state_from_json(json.loads(json.dumps(state)), arrays))
    later = range(12, 12 + 3 * (staleness + 1))
    assert [again.problem(number) for number in later] == [course.problem(number) for number in later]


def test_levels_are_metrics_and_events_and_a_resumed_run_goes_on_at_its_own(tmp_path: Path) -> None:
    wish = climbing()
    whole, parts = folder(tmp_path / "whole", wish), folder(tmp_path / "parts", wish)
    with whole:
        run(wish, whole)
    run(climbing(run__total_steps=1), parts)
    parts.log_event(2, "level_raised", "of a process that was killed before its next checkpoint")
    parts.finish()
    with RunDirectory.open(parts.path) as again:
        run(wish, again, resume=True)
    found = [[untimed(line) for line in read_jsonl(one.metrics_path)] for one in (parts, whole)]
    assert found[0] == found[1]
    assert [(line["level"], line.get("level_raised", 0)) for line in found[0]] == [(0, 0), (1, 1), (2, 2)]
    assert read_jsonl(parts.samples_path) == read_jsonl(whole.samples_path)
    for one in (whole, parts):
        assert [event for event in read_run(one.path).events() if "level" in event[1][:30]] == [
            (1, "climbing: level raised from 0 to 1, as 100% of answers were right"),
            (2, "climbing: level raised from 1 to 2, as 100% of answers were right"),
            (3, "climbing: level lowered from 2 to 1, as 0% of answers were right"),
        ]
        # Held-out problems stay at their own level.
        assert [(line["level"], line["mean"]) for line in read_jsonl(one.eval_path)][-1] == (2.0, 0.0)


def test_a_curriculum_of_reasoning_gym_by_name() -> None:
    pytest.importorskip("reasoning_gym")
    options = {"min_terms": 9, "max_terms": 9, "allow_negation": False}
    train, held_out = make_tasks(TaskConfig(name="chain_sum", levels=("num_terms",), options=options))
    inner = levelled(train)
    assert inner is not None
    assert inner.num_levels("chain_sum") == 11
    for task in (train, held_out):
        for level in (0, 4):
            problems = [task.problem(level_index(level, position)) for position in range(30)]
            texts = [problem.messages[0]["content"] for problem in problems if problem.messages]
            terms = [sum(word.isdigit() for word in text.replace("?", "").split()) for text in texts]
            assert (min(terms), max(terms)) == (2, 2 + level)
            assert all(len(word) == 1 for text in texts for word in text.split() if word.isdigit())


def test_impossible_curricula_are_refused(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    for wishes, message in (
        ({"name": "chain_sum", "levels": ("num_term",)}, "did you mean 'num_terms'"),
        ({"name": "acre", "levels": ("all",)}, "no curriculum"),
        ({"name": "modulo_grid", "levels": ("all",)}, "one level"),  # its own generator refuses the next
        ({"name": "chain_sum", "levels": ("all",), "options": {"max_terms": 2, "max_digits": 1}}, "one level"),
        ({"name": str(tmp_path / "some.jsonl"), "levels": ("all",)}, "has no levels"),
        ({"name": "tests.rl.lm.digits:Digits", "levels": ("all",)}, "LevelledTask"),
        ({"name": "tests.rl.lm.digits:Ladder", "levels": ("height",)}, "'all'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_tasks(TaskConfig(**wishes))  # type: ignore[arg-type]
    for bad in ({"lower": 0.7}, {"window": 0}, {"first": 2, "highest": 1}):
        with pytest.raises(ConfigError, match="expected"):
            CurriculumConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="levels of climbing are 0 to 3"):
        Curriculum(Ladder(), CurriculumConfig(first=4)).index(0)
    with pytest.raises(ConfigError, match="has no levels"):
        run(config(evaluation__level=1))
