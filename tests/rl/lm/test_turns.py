"""Episodes of several turns in messages: append-only tokens, learned exactly."""

from __future__ import annotations

import itertools
import time

import pytest

from lockstep.core.trajectory import Problem, Verdict
from lockstep.envs.lm.player import Player
from lockstep.envs.lm.task import Episode, EpisodeTask, Turn
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool
from lockstep.learn.learner import LearnerConfig
from lockstep.learn.model import ModelConfig, build
from lockstep.learn.optimiser import OptimiserConfig
from lockstep.rl.lm.problems import ProblemSource
from lockstep.rl.lm.report import readable
from lockstep.rl.lm.rollout import Group, RolloutConfig, Rollouts
from lockstep.rl.lm.sampler import new_sampler
from lockstep.rl.lm.start import StartConfig, supervised_start
from tests.rl.lm.small import config, run

ASKED = {"role": "user", "content": "say a letter"}
AGAIN = {"role": "user", "content": "and another"}


class Talk(Episode):
    """Three turns; a turn is worth the share of vowels in it."""

    def __init__(self) -> None:
        self._turn = 0

    def start(self) -> Problem:
        return Problem(index=0, messages=(ASKED,), answer="a")

    def step(self, text: str) -> Turn:
        self._turn += 1
        reward = sum(letter in "aeiou" for letter in text) / (len(text) + 1)
        done = self._turn == 3
        return Turn(messages=() if done else (AGAIN,), reward=reward, is_done=done)


class Talks(EpisodeTask):
    def __init__(self, split: str = "train", seed: int = 0) -> None:
        pass

    @property
    def name(self) -> str:
        return "talks"

    @property
    def num_problems(self) -> int | None:
        return None

    def episode(self, index: int) -> Episode:
        return Talk()


def collect(max_context: int, workers: int = 0) -> tuple[Group, Rollouts]:
    sizes = ModelConfig(width=32, hidden=64, num_layers=1, num_heads=2, vocab_size=270, max_context=max_context)
    made = build(sizes, ["say a letter"], 1, None)
    # A new model never ends its turn by itself.
    start = StartConfig(steps=12, batch=8, learner=LearnerConfig(optimiser=OptimiserConfig(lr=1e-2)))
    supervised_start(made.model, made.tokenizer, ProblemSource(Talks(), 1), start)
    limits = RolloutConfig(groups=1, group_size=6, max_tokens=12, memory_mb=8, max_sequences=8, workers=workers)
    sampler = new_sampler(made, limits, None)
    with VerifierPool(VerifierConfig(workers=0)) as verifier, sampler as (engine, publisher):
        publisher.publish(0)
        rollouts = Rollouts(engine, Talks(), Talks().problem, verifier, limits, seed=1)
        return rollouts.collect([0])[0], rollouts


def test_messages_are_appended_and_nothing_before_them_is_touched() -> None:
    group, rollouts = collect(400)
    tokenizer = rollouts.engine.tokenizer
    assert tokenizer is not None
    ended = 0
    for one in group.trajectories:
        assert one.num_turns == 3 or one.is_truncated
        spans = "".join("s" if sampled else "." for sampled in one.is_sampled)
        assert spans.count(".s") == one.num_turns
        between = [tokenizer.decode(part, skip_special=False) for part in _others(one.tokens, one.is_sampled)]
        assert "say a letter" in between[0]
        assert all("and another" in text for text in between[1:])
        ended += one.num_turns > 1
    assert ended
    told = [row["text"] for row in readable(group, {}, {}, tokenizer)]
    for one, text in zip(group.trajectories, told, strict=True):
        assert text.count("and another") == one.num_turns - 1
        assert "say a letter" not in text


def _others(tokens: list[int], is_sampled: list[bool]) -> list[list[int]]:
    parts: list[list[int]] = []
    before = True
    for token, sampled in zip(tokens, is_sampled, strict=True):
        if not sampled:
            if before:
                parts.append([])
            parts[-1].append(token)
        before = sampled
    return parts


class Fragile(Talk):
    """Raises, hangs, answers nonsense, or works: by its index."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index

    def start(self) -> Problem:
        return Problem(index=self._index, messages=(ASKED,))

    def step(self, text: str) -> Turn:
        if self._index == 0:
            raise KeyError("no such room")
        if self._index == 1:
            time.sleep(30.0)
        return super().step(text) if self._index == 3 else 0.5  # type: ignore[return-value]


class FragileTalks(Talks):
    def episode(self, index: int) -> Episode:
        return Fragile(index)


class Unlike(Talks):
    """Raises in the first episode, and in the others never answers the same twice."""

    count = itertools.count()

    def episode(self, index: int) -> Episode:
        return Fragile(0) if index == 0 else Counting()


class Counting(Talk):
    def step(self, text: str) -> Turn:
        return Turn(messages=(AGAIN,), reward=float(next(Unlike.count)))


def test_an_episode_that_raises_hangs_or_answers_nonsense_ends_without_a_reward() -> None:
    sizes = ModelConfig(width=32, hidden=64, num_layers=1, num_heads=2, vocab_size=270, max_context=200)
    made = build(sizes, ["say a letter"], 1, None)
    limits = RolloutConfig(groups=4, group_size=1, max_tokens=2, memory_mb=8, max_sequences=8)
    with (
        VerifierPool(VerifierConfig(workers=0, timeout_s=0.2)) as verifier,
        new_sampler(made, limits, None) as (engine, publisher),
    ):
        publisher.publish(0)
        rollouts = Rollouts(engine, FragileTalks(), FragileTalks().problem, verifier, limits, seed=1)
        scores = [group.trajectories[0].score for group in rollouts.collect(range(4))]
    raised, hung, nonsense, right = [score for score in scores if score is not None]
    assert (raised.verdict, hung.verdict, nonsense.verdict) == (Verdict.FAILED, Verdict.TIMED_OUT, Verdict.FAILED)
    assert "no such room" in raised.detail
    assert "float; expected a Turn" in nonsense.detail
    assert right.is_scored
    assert (verifier.counts[Verdict.FAILED], verifier.counts[Verdict.TIMED_OUT]) == (2, 1)


def test_a_turn_costs_a_step_and_a_replay_only_where_the_episode_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = []
    step = Talk.step
    monkeypatch.setattr(Talk, "step", lambda self, text: (stepped.append(text), step(self, text))[1])
    player = Player(Talks())
    alike = [
        player.play(0, ("a",)),
        player.play(0, ("a",)),
        player.play(0, ("a", "e")),
        player.play(0, ("a", "e", "x")),
    ]
    assert stepped == ["a", "a", "e", "x"]
    stepped.clear()
    assert player.play(0, ("a", "e", "x")) == alike[-1]  # it is over, and forgotten
    assert stepped == ["a", "e", "x"]


def test_the_greedy_baseline_is_greedy_at_every_turn() -> None:
    task, limits = Talks(), RolloutConfig(group_size=2, greedy_baseline=True)
    with VerifierPool(VerifierConfig(workers=0)) as verifier:
        made = build(ModelConfig(width=32, hidden=64, num_layers=1, num_heads=2, vocab_size=270), ["a"], 1, None)
        with new_sampler(made, limits, None) as (engine, _):
            rollouts = Rollouts(engine, task, task.problem, verifier, limits, seed=1)
            assert [rollouts._params(0, index, turn).temperature for index in (1, 2) for turn in (0, 1)] == [1, 1, 0, 0]


def test_an_episode_ends_where_the_context_does() -> None:
    group, _ = collect(40)
    assert any(one.num_turns < 3 for one in group.trajectories)
    assert all(len(one.tokens) <= 40 for one in group.trajectories)


@pytest.mark.parametrize("staleness", [0, 1])
def test_turns_are_learned_from(staleness: int) -> None:
    wish = config(
        task__name="tests.rl.lm.test_turns:Talks",
        start__steps=12,
        start__learner__optimiser__lr=1e-2,
        model__max_context=200,
        rollout__max_tokens=8,
        staleness=staleness,
    )
    _, found = run(wish)
    assert max(line["turns"] for _, line in found) > 1.0
    if staleness == 0:
        assert max(line.get("mismatch_max", 0.0) for _, line in found) == 0.0
    assert any(line.get("grad_norm", 0.0) > 0.0 for _, line in found)
