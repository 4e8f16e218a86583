"""Tasks by the words of `lockstep train`: every kind makes two halves that share no problem, bad ones are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.core.errors import ConfigError, FormatError
from lockstep.envs.lm.code import CodeTask
from lockstep.envs.lm.find import find_task
from lockstep.envs.lm.games import TextEnvTask
from lockstep.envs.lm.make import TaskConfig, make_task, make_tasks
from lockstep.envs.lm.records import RecordsTask, Sample
from lockstep.envs.lm.strict import StrictTask

HERE = "tests.envs.lm.test_make"
EPISODES = "tests.envs.lm.test_episodes"


def half(sample: Sample) -> float:
    return 0.5


def no_halves() -> None:
    """Takes neither split nor seed."""


def rows(path: Path, made: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return rows(tmp_path / "sums.jsonl", [{"question": f"{a} + 2?", "answer": str(a + 2)} for a in range(60)])


@pytest.fixture
def programs(tmp_path: Path) -> str:
    return rows(
        tmp_path / "code.jsonl",
        [{"prompt": f"f(x) = x + {a}", "tests": [f"assert f(1) == {a + 1}"]} for a in range(60)],
    )


def asked(task: Any) -> set[str]:
    return {str(task.problem(index).messages) for index in range(task.num_problems)}


def test_files_are_parted_by_their_texts(questions: str, programs: str) -> None:
    for name in (questions, f"code:{programs}"):
        train, held_out = make_tasks(TaskConfig(name=name, options={"held_out_share": 0.3}))
        assert not asked(train) & asked(held_out)
        assert len(asked(train)) + len(asked(held_out)) == 60
        assert 5 < len(asked(held_out)) < 30
    assert isinstance(find_task(f"code:{programs}"), CodeTask)


def test_a_users_score_keeps_what_it_gives_and_reasoning_gym_is_right_or_wrong(questions: str) -> None:
    task = make_tasks(TaskConfig(name=questions, options={"judge": f"{HERE}:half"}))[0]
    assert isinstance(task, RecordsTask)
    assert task.score(task.problem(0), "no").value == 0.5
    strict = make_tasks(TaskConfig(name=questions, options={"judge": f"{HERE}:half"}, partial_credit="no"))[0]
    assert strict.score(strict.problem(0), "no").value == 0.0
    pytest.importorskip("reasoning_gym")
    assert isinstance(make_tasks(TaskConfig(name="reasoning_gym:chain_sum"))[0], StrictTask)


def test_options_of_programs_go_where_they_belong(programs: str) -> None:
    task = make_task(
        TaskConfig(name=f"code:{programs}", options={"reward": "share", "timeout_s": 2, "memory_mb": 256}), "train"
    )
    assert isinstance(task, CodeTask)
    assert (task.config.reward, task.config.sandbox.timeout_s, task.config.sandbox.memory_mb) == ("share", 2, 256)


def test_a_text_environment_is_a_task_by_its_import_path() -> None:
    train, held_out = make_tasks(TaskConfig(name=f"{EPISODES}:Counter", options={"max_turns": 3}))
    assert isinstance(train, TextEnvTask)
    assert isinstance(held_out, TextEnvTask)
    assert (train.config.split, held_out.config.split, train.config.max_turns) == ("train", "held_out", 3)


@pytest.mark.slow  # TextArena takes seconds to import
def test_games_by_name() -> None:
    pytest.importorskip("textarena")
    task = make_task(TaskConfig(name="textarena:TicTacToe-v0", options={"num_players": 2, "seat": "first"}), "train")
    assert task.problem(0).messages
    with pytest.raises(ConfigError, match="unknown TextArena game 'TicTacTo-v0'; did you mean 'TicTacToe-v0'") as told:
        make_task(TaskConfig(name="textarena:TicTacTo-v0"), "train")
    assert len(str(told.value)) < 500


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("FILE", {"judge": f"{HERE}:nothing"}, "has no 'nothing'; expected a judge"),
        ("FILE", {"prompt": "q"}, "unknown option of RecordsConfig 'prompt'; did you mean 'prompt_key'"),
        ("FILE", {"form": "chatty"}, "unknown RecordsConfig.form 'chatty'; did you mean 'chat'"),
        ("FILE", {"held_out_share": "a"}, "held_out_share='a' is str; expected float"),
        ("code:FILE", {}, "must be text"),
        (f"{HERE}:no_halves", {}, "unexpected keyword argument 'split'; it makes one half"),
        (f"{HERE}:HERE", {}, "is str; training needs two tasks"),
        (f"{HERE}:nothing", {}, "has no 'nothing'; expected a task; known: reasoning_gym:NAME"),
        ("no_such_module:Task", {}, "No module named 'no_such_module'"),
        ("missing.jsonl", {}, "missing.jsonl: cannot be read"),
    ],
)
def test_words_that_name_no_task(name: str, options: dict[str, Any], says: str, questions: str) -> None:
    with pytest.raises((ConfigError, FormatError), match=says):
        make_tasks(TaskConfig(name=name.replace("FILE", questions), options=options))
