"""reasoning-gym as a task: the same problem in any process, splits that share no question, levels, mixtures."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

from lockstep.core.env import child_environment
from lockstep.core.errors import ConfigError, InputError
from lockstep.envs.lm.mixture import Curriculum, CurriculumConfig, MixtureTask
from lockstep.envs.lm.reasoning_gym import NO_REFERENCE, ReasoningGymConfig, ReasoningGymTask, generators
from lockstep.envs.lm.task import level_index


def task(generator: str = "chain_sum", **wishes: object) -> ReasoningGymTask:
    return ReasoningGymTask(ReasoningGymConfig(generator=generator, **wishes))  # type: ignore[arg-type]


TINY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_a_problem_is_a_function_of_configuration_and_index() -> None:
    for kind in (task(), task("list_functions"), task("pool_matrix")):
        again = pickle.loads(pickle.dumps(kind))
        assert [kind.problem(i) for i in (0, 5, 1 << 39)] == [again.problem(i) for i in (0, 5, 1 << 39)]
    questions = {task(seed=seed).problem(i).prompt for seed in (0, 1) for i in range(20)}
    assert len(questions) >= 38  # other seeds are other streams, not the same one shifted


@pytest.mark.slow
def test_string_hashes_of_a_process_change_no_problem() -> None:
    program = (
        "from lockstep.envs.lm.reasoning_gym import *\n"
        "task = ReasoningGymTask(ReasoningGymConfig(generator='ransom_note'))\n"
        "print([task.problem(i).prompt for i in (2, 0)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=child_environment(PYTHONHASHSEED=seed),
            capture_output=True,
            check=True,
            timeout=250,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # numpy's, at answers that are no matrix
def test_every_generator_poses_judges_and_repeats() -> None:
    """In one test: the names of a hundred would cost every run of the suite the import of them all."""
    for generator in generators():
        assert_poses_judges_and_repeats(generator)


def assert_poses_judges_and_repeats(generator: str) -> None:
    kind = task(generator, held_out_share=0.0)
    first, second = kind.problem(0), kind.problem(1)
    assert first.prompt != second.prompt, generator
    assert task(generator, held_out_share=0.0).problem(1) == second, generator
    for problem in (first, second):
        assert len(problem.prompt or "") > 10, generator
        if generator in NO_REFERENCE:
            continue
        assert kind.score(problem, problem.answer).value == 1, generator
    for text in ("", "zzz", "-1", "[1, 2", "1/0", "{}", "a\nb\nc", "True", "((", "9" * 50):
        score = kind.score(first, text)
        assert score.is_scored, (generator, text)
        assert score.value < 1 or text == first.answer.strip(), (generator, text)


def test_splits_share_no_question_even_of_a_small_generator() -> None:
    train = {task(options=TINY, seed=1).problem(i).prompt for i in range(400)}
    held_out = {
        task(options=TINY, seed=seed, split="held_out").problem(i).prompt for seed in (1, 2) for i in range(200)
    }
    assert not train & held_out
    assert min(len(train), len(held_out)) > 20


def test_forms_and_where_the_answer_stands() -> None:
    plain, chat = task(), task(form="chat")
    problem, talk = plain.problem(3), chat.problem(3)
    assert problem.prompt is not None
    assert talk.messages is not None
    assert problem.prompt == f"{talk.messages[1]['content']}\n"
    assert plain.score(problem, f" {problem.answer}\n").value == 1
    assert chat.score(talk, f"<think>1</think> <answer>1</answer> no, <answer> {problem.answer} </answer>").value == 1
    assert chat.score(talk, talk.answer).value == 1
    missing = chat.score(talk, problem.answer)
    assert (missing.value, missing.detail) == (0, "no <answer> tag")
    last = task(answer_in="last_line")
    assert last.score(last.problem(3), f"so\n\n{problem.answer}\n\n").value == 1


def test_upstream_verdicts_that_would_mislead() -> None:
    halting = task("game_of_life_halting", held_out_share=0.0)
    problem = halting.problem(0)
    other = {"True": "False", "False": "True"}[problem.answer]
    assert [halting.score(problem, text).value for text in (problem.answer, other, "zzz")] == [1, 0, 0]
    coins = task("coin_flip")
    problem = coins.problem(0)
    assert 0 < float(problem.answer) < 1
    assert [coins.score(problem, text).value for text in (problem.answer, "0", "0.", "1/3")] == [1, 0, 0, 0]
    primes = task("prime_factorization")
    score = primes.score(primes.problem(0), "two times three")
    assert (score.value, score.is_scored, score.detail[:10]) == (0, True, "unreadable")


def test_wrong_wishes_are_told() -> None:
    for wishes, message in (
        ({"generator": "chain_sun"}, "did you mean 'chain_sum'"),
        ({"options": {"min_term": 3}}, "did you mean 'min_terms'"),
        ({"options": {"min_terms": 5, "max_terms": 2}}, "refuses"),
        ({"generator": "acre", "has_levels": True}, "no curriculum"),
        ({"template": "Q"}, "question"),
        ({"held_out_share": 1.0}, "held_out_share"),
    ):
        with pytest.raises(ConfigError, match=message):
            task(**wishes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="levels are 0 to 0"):
        task().problem(level_index(1, 0))
    with pytest.raises(ConfigError, match="too few"):
        task("ab", options={"length": 1}, split="held_out", held_out_share=0.001).problem(0)


def test_levels_rise_when_mastered_and_survive_a_restart() -> None:
    mixture = MixtureTask([(task(has_levels=True), 3), (task("count_bits", has_levels=True), 1)], seed=4)
    curriculum = Curriculum(mixture, CurriculumConfig(window=4, threshold=0.75))
    assert {mixture.skill(position) for position in range(40)} == {"chain_sum", "count_bits"}
    ups = 0
    for position in range(200):
        index = curriculum.index(position)
        problem = mixture.problem(index)
        assert mixture.score(problem, problem.answer).value == 1
        ups += curriculum.observe(index, float(mixture.skill(position) == "chain_sum")) is not None
        if position == 100:
            state = json.loads(json.dumps(curriculum.state_dict()))
            curriculum = Curriculum(mixture, CurriculumConfig(window=4, threshold=0.75))
            curriculum.load_state_dict(state)
    assert curriculum.levels == {"chain_sum": mixture.num_levels("chain_sum") - 1, "count_bits": 0}
    assert ups == curriculum.levels["chain_sum"]
    assert not curriculum.observe(level_index(0, 3), 1.0)
    shares = [mixture.skill(position) == "chain_sum" for position in range(1000)]
    assert 0.7 < sum(shares) / 1000 < 0.8
