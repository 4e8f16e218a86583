"""Episodes of several turns: tools, environments of the user's, TextArena's games, each played again from its texts."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from lockstep.core.errors import ConfigError, EnvError, InputError
from lockstep.core.trajectory import Score, Verdict
from lockstep.envs.lm.games import TextArenaConfig, TextArenaTask, TextEnv, TextEnvConfig, TextEnvTask, random_move
from lockstep.envs.lm.records import RecordsConfig, RecordsTask
from lockstep.envs.lm.task import Turn
from lockstep.envs.lm.tools import ToolsConfig, ToolTask, read_calls, tool_schema
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool


def multiply(a: int, b: int = 2, *, unit: Literal["", "m"] = "") -> str:
    """Multiply two
    numbers.

    More that the model need not know.
    """
    return f"{a * b}{unit}"


def divide(a: float, b: float) -> dict[str, float]:
    """Divide."""
    return {"quotient": a / b}


def sleep_for_ever() -> None:
    """Hangs."""
    time.sleep(60)


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def tool_task(*more: Any, **wishes: Any) -> ToolTask:
    records = [{"question": "Six times seven?", "answer": "42"}]
    return ToolTask(RecordsTask(RecordsConfig(), records=records), [multiply, divide, *more], ToolsConfig(**wishes))


def test_tools_are_called_answered_and_the_last_answer_is_judged() -> None:
    task = tool_task()
    episode = task.episode(0)
    problem = episode.start()
    assert [tool["function"]["name"] for tool in problem.tools] == ["multiply", "divide"]
    turn = episode.step(
        f"<think>{call('multiply', '{}')}</think>Let me see. "
        + call("multiply", '{"a": 6, "b": 7}')
        + call("divide", '{"a": 1, "b": 0}')
    )
    assert [message["content"] for message in turn.messages] == ["42", "Error: ZeroDivisionError: division by zero"]
    assert [message["tool_call_id"] for message in turn.messages] == ["call_0", "call_1"]
    assert not turn.is_done
    wrong = {
        call("add", "{}"): "Error: no tool is called 'add'; there are multiply, divide",
        call("multiply", '{"b": 2}'): "Error: missing a required argument: 'a'",
        call("multiply", '{"a": 2, "c": 1}'): "Error: got an unexpected keyword argument 'c'",
    }
    for number, (text, message) in enumerate(wrong.items(), 2):
        turn = episode.step(text)
        assert (turn.messages[0]["content"], turn.messages[0]["tool_call_id"]) == (message, f"call_{number}")
    assert episode.step("<think>42</think> The answer is 42.") == Turn(reward=1.0, is_done=True)
    assert task.episode(0).step("41") == Turn(reward=0.0, is_done=True)
    short = tool_task(max_turns=2)
    assert short.play(0, [call("divide", '{"a": 1, "b": 2}')]).messages[0]["content"] == '{"quotient": 0.5}'
    assert short.play(0, [call("divide", "{}")] * 2) == Turn(is_done=True, is_truncated=True)


def test_a_schema_is_read_off_the_function() -> None:
    schema = tool_schema(multiply)["function"]
    assert (schema["name"], schema["description"]) == ("multiply", "Multiply two numbers.")
    assert schema["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}, "unit": {"enum": ["", "m"]}},
        "required": ["a"],
    }

    def nested(x: list[dict[str, int | None]], y: str | list[str] = "") -> None: ...

    assert tool_schema(nested)["function"]["parameters"]["properties"]["x"]["items"]["additionalProperties"] == {
        "anyOf": [{"type": "integer"}, {"type": "null"}]
    }
    for bad in (lambda x: x, lambda *x: x):
        with pytest.raises(ConfigError, match="parameter 'x'"):
            tool_schema(bad)
    with pytest.raises(ConfigError, match="names must differ"):
        tool_task(multiply)
    with pytest.raises(ConfigError, match="did you mean 'hermes'"):
        tool_task(format="herms")
    assert read_calls('{"name": "f", "parameters": {"x": 1}}', format="llama3")[1][0].arguments == '{"x": 1}'


class Counter(TextEnv):
    """Say numbers up; ends at 3, or with a fault."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def reset(self, seed: int) -> str:
        self.count = self.start
        return f"Count on from {self.count} (seed {seed % 1000})."

    def step(self, action: str) -> tuple[str, float, bool, bool, Mapping[str, Any]]:
        if action == "die":
            os._exit(3)
        if action == "hang":
            time.sleep(60)
        if action == "nan":
            return "", float("nan"), False, False, {}
        self.count += 1
        is_right = int(action) == self.count
        return "Go on.", float(is_right), self.count == 3, self.count > 8, {}


ENV = "tests.envs.lm.test_episodes:Counter"


def test_an_environment_of_the_user_is_an_episode() -> None:
    task = TextEnvTask(TextEnvConfig(env=ENV, options={"start": 1}, max_turns=2))
    episode = task.episode(7)
    opening = episode.start()
    assert opening.messages is not None
    assert opening.messages[-1]["content"] == "Count on from 1 (seed 7)."
    assert episode.step("2") == Turn(messages=({"role": "user", "content": "Go on."},), reward=1.0)
    assert episode.step("0") == Turn(reward=0.0, is_done=True)
    plain = TextEnvTask(TextEnvConfig(env=ENV, form="plain", max_turns=2))
    assert plain.problem(0).prompt == "Count on from 0 (seed 0).\n"
    assert plain.play(0, ["1"]) == Turn(text="\nGo on.\n", reward=1.0)
    assert plain.play(0, ["1", "2"]) == Turn(reward=1.0, is_done=True, is_truncated=True)
    with pytest.raises(InputError, match="ended at turn 2"):
        plain.play(0, ["1", "2", "3"])
    with pytest.raises(EnvError, match="finite"):
        plain.play(0, ["nan"])
    for path, message in (("nowhere:X", "nowhere"), (ENV.replace("Counter", "multiply"), "no subclass")):
        with pytest.raises(ConfigError, match=message):
            TextEnvTask(TextEnvConfig(env=path))


@pytest.mark.slow
def test_episodes_in_workers_outlive_those_that_hang_or_die() -> None:
    task = TextEnvTask(TextEnvConfig(env=ENV))
    with VerifierPool(VerifierConfig(workers=1, timeout_s=1.0)) as pool:
        items = [(0, ["1"]), (1, ["die"]), (0, ["1", "2"]), (2, ["hang"]), (0, ["1", "2", "3"]), (3, ["one"])]
        first, died, second, hung, last, raised = pool.step_all(task, items)
        [stuck] = pool.step_all(tool_task(sleep_for_ever), [(0, [call("sleep_for_ever", "{}")])])
        counts = dict(pool.counts)
    assert isinstance(first, Turn)
    assert isinstance(second, Turn)
    assert last == Turn(reward=1.0, is_done=True)
    verdicts = [score.verdict for score in (died, hung, raised, stuck) if isinstance(score, Score)]
    assert verdicts == [Verdict.FAILED, Verdict.TIMED_OUT, Verdict.FAILED, Verdict.TIMED_OUT]
    assert counts == {Verdict.SCORED: 1, Verdict.FAILED: 2, Verdict.TIMED_OUT: 2}


def first_move(observation: str, chance: random.Random) -> str:
    return "[0]"


def play(task: TextArenaTask, index: int, chance: random.Random) -> tuple[list[str], Turn]:
    """Play by random moves to the end."""
    episode = task.episode(index)
    opening = episode.start()
    assert opening.messages is not None
    shown, texts = [opening.messages[-1]["content"]], []
    while True:
        texts.append(random_move(shown[-1], chance))
        turn = episode.step(texts[-1])
        if turn.is_done:
            assert task.play(index, texts) == turn
            return shown, turn
        shown.append(turn.messages[0]["content"])


@pytest.mark.slow  # TextArena takes seconds to import
def test_textarena_against_a_random_opponent() -> None:
    pytest.importorskip("textarena")
    task = TextArenaTask(TextArenaConfig(game="TicTacToe-v0", num_players=2))
    before = random.getstate()
    games = [play(task, index, random.Random(index)) for index in range(12)]
    assert random.getstate() == before
    assert {turn.reward for _, turn in games} >= {1.0, -1.0}
    openings = {shown[0].count("placed") for shown, _ in games}
    assert openings == {0, 1}  # the model sits in either seat
    assert all("placed" in text for shown, _ in games for text in shown[1:])
    assert games[3] == play(task, 3, random.Random(3))
    lazy = TextArenaTask(
        TextArenaConfig(game="TicTacToe-v0", num_players=2, opponent=f"{__name__}:first_move", seat="first")
    )
    assert lazy.play(0, ["[4]"]).messages[0]["content"].count("cell 0") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "game", ["TowerOfHanoi-v0", "Mastermind-v0", "FrozenLake-v0", "LightsOut-v0", "2048-v0-mega-easy"]
)
def test_textarena_for_one(game: str) -> None:
    pytest.importorskip("textarena")
    task = TextArenaTask(TextArenaConfig(game=game, max_turns=4))
    shown, turn = play(task, 0, random.Random(1))
    assert len(shown[0]) > 50
    assert turn.is_done


@pytest.mark.slow  # TextArena takes seconds to import
def test_textarena_wishes_are_checked() -> None:
    pytest.importorskip("textarena")
    with pytest.raises(ConfigError, match="did you mean 'TicTacToe-v0'"):
        TextArenaTask(TextArenaConfig(game="TicTacTo-v0"))
    with pytest.raises(ConfigError, match="refuses num_players=5"):
        TextArenaTask(TextArenaConfig(game="TicTacToe-v0", num_players=5)).problem(0)
