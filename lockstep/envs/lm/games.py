"""Text games as episodes: TextArena's, and any environment of the user's with the manners of Gymnasium's."""

from __future__ import annotations

import contextlib
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from lockstep.core.errors import ConfigError, EnvError, unknown_name
from lockstep.core.extras import require
from lockstep.core.trajectory import Problem
from lockstep.envs.lm.records import find_object
from lockstep.envs.lm.task import Episode, EpisodeTask, Turn, check_index

Opponent = Callable[[str, random.Random], str]
"""(all that the player has been shown since its last move, chance) to its move."""
_MOVE = re.compile(r"\[[^\[\]\n]{1,40}\]")
_OFFERED = re.compile(r"(?:available|valid|legal|possible)[^\n:]*:\s*([^\n]*(?:\n\s*['\"]?\[[^\n]*)*)", re.IGNORECASE)


class TextEnv(ABC):
    """A text environment of the user's. Deterministic: the seed and the actions decide everything."""

    @abstractmethod
    def reset(self, seed: int) -> str:
        """Begin an episode; the first observation."""

    @abstractmethod
    def step(self, action: str) -> tuple[str, float, bool, bool, Mapping[str, Any]]:
        """(observation, reward, terminated, truncated, info) after what the model wrote."""


@dataclass(frozen=True, kw_only=True)
class TextEnvConfig:
    """An environment by import path."""

    env: str
    """`my_module:MyEnv`, a subclass of `TextEnv`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of its constructor."""
    seed: int = 0
    """Of the episodes: each takes its own from this one."""
    split: Literal["train", "held_out"] = "train"
    """Seeds held out are 2^62 away from those trained on."""
    max_turns: int = 64
    """Turns of the model before the episode ends as truncated."""
    form: Literal["plain", "chat"] = "chat"
    """Turns as plain text, or as messages by the chat template."""
    system: str = ""
    """System message of the chat form; empty for none."""


@final
class TextEnvTask(EpisodeTask):
    """Episodes of a `TextEnv`; the index decides the seed.

    Raises:
        ConfigError: the import path names no `TextEnv`.
    """

    def __init__(self, config: TextEnvConfig) -> None:
        self.config = config
        self._kind = find_object(config.env, "text environment; give my_module:MyEnv")
        if not (isinstance(self._kind, type) and issubclass(self._kind, TextEnv)):
            raise ConfigError(f"{config.env!r} is no subclass of lockstep.envs.lm.games.TextEnv")

    def __reduce__(self) -> tuple[Any, ...]:
        return TextEnvTask, (self.config,)

    @property
    def name(self) -> str:
        return self.config.env.rpartition(":")[2]

    @property
    def num_problems(self) -> int | None:
        return None

    def episode(self, index: int) -> Episode:
        check_index(index, self)
        env = self._kind(**self.config.options)
        return _TextEnvEpisode(env, self.config, index, _seed(self.config.seed, index, self.config.split))


class _TextEnvEpisode(Episode):
    def __init__(self, env: TextEnv, config: TextEnvConfig, index: int, seed: int) -> None:
        self._env, self._config, self._index, self._seed = env, config, index, seed
        self._num_turns = 0

    def start(self) -> Problem:
        return _opening(self._env.reset(self._seed), self._index, self._config.form, self._config.system)

    def step(self, text: str) -> Turn:
        self._num_turns += 1
        observation, reward, terminated, truncated, _ = self._env.step(text)
        is_late = not terminated and self._num_turns >= self._config.max_turns
        return _turn(
            observation,
            self._config.form,
            reward=reward,
            is_done=bool(terminated or truncated or is_late),
            is_truncated=bool(not terminated and (truncated or is_late)),
        )


@dataclass(frozen=True, kw_only=True)
class TextArenaConfig:
    """One of TextArena's games."""

    game: str
    """Its id, such as `TicTacToe-v0`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for the game."""
    num_players: int = 1
    """Players at the table, the model among them."""
    opponent: str = "random"
    """Who plays the other players: "random" takes one of the moves that the game lists, or `my_module:function`, an
    `Opponent`."""
    seat: Literal["first", "last", "either"] = "either"
    """The model's place at the table; "either": chance decides."""
    seed: int = 0
    """Of the games: each takes its own from this one."""
    split: Literal["train", "held_out"] = "train"
    """Seeds held out are 2^30 away from those trained on."""
    max_turns: int = 64
    """Turns of the model before the game ends as truncated."""
    form: Literal["plain", "chat"] = "chat"
    """Turns as plain text, or as messages by the chat template."""
    system: str = ""
    """System message of the chat form; empty for none."""


@final
class TextArenaTask(EpisodeTask):
    """Episodes of a TextArena game; the reward is the game's own for the model's player, at the end.

    TextArena's games draw from Python's one global generator; each episode here has a state of its own, which is put
    back around every call, so that episodes side by side do not disturb each other.

    Raises:
        ConfigError: an unknown game, option or opponent.
        MissingExtraError: textarena is not installed.
    """

    def __init__(self, config: TextArenaConfig) -> None:
        self.config = config
        known = require("textarena.envs.registration", extra="textarena").ENV_REGISTRY
        if config.game not in known:
            raise ConfigError(unknown_name("TextArena game", config.game, known))
        self.opponent: Opponent = (
            random_move
            if config.opponent == "random"
            else find_object(config.opponent, "opponent: random or a function")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TextArenaTask, (self.config,)

    @property
    def name(self) -> str:
        return self.config.game

    @property
    def num_problems(self) -> int | None:
        return None

    def episode(self, index: int) -> Episode:
        check_index(index, self)
        return _TextArenaEpisode(self.config, self.opponent, index)


class _TextArenaEpisode(Episode):
    def __init__(self, config: TextArenaConfig, opponent: Opponent, index: int) -> None:
        self._config, self._opponent, self._index = config, opponent, index
        self._chance = random.Random(f"textarena/{config.seed}/{config.split}/{index}")
        self._state = random.Random(self._chance.random()).getstate()
        seats = {"first": 0, "last": config.num_players - 1}
        self._player = seats.get(config.seat, self._chance.randrange(config.num_players))
        self._env: Any = None
        self._num_turns = 0

    def start(self) -> Problem:
        arena = require("textarena", extra="textarena")
        with self._own_chance():
            try:
                self._env = arena.make(self._config.game, **self._config.options)
                while isinstance(self._env, arena.Wrapper):  # they rewrite what players see at every turn
                    self._env = self._env.env
                self._env.reset(num_players=self._config.num_players, seed=self._chance.randrange(1 << 30))
            except (TypeError, AssertionError, ValueError) as error:
                raise ConfigError(
                    f"{self._config.game} refuses num_players={self._config.num_players}, options "
                    f"{dict(self._config.options)}: {error}"
                ) from error
            is_done, text = self._play_others()
        if is_done:
            raise EnvError(f"{self._config.game}: episode {self._index} ended before the model could move")
        return _opening(text, self._index, self._config.form, self._config.system)

    def step(self, text: str) -> Turn:
        self._num_turns += 1
        with self._own_chance():
            is_done, _ = self._env.step(action=text.rpartition("</think>")[2].strip())
            shown = ""
            if not is_done:
                is_done, shown = self._play_others()
            if is_done:
                rewards, _ = self._env.close()
                return Turn(reward=self._reward(rewards), is_done=True)
        if self._num_turns >= self._config.max_turns:
            return Turn(is_done=True, is_truncated=True)
        return _turn(shown, self._config.form)

    def _reward(self, rewards: Mapping[int, float] | None) -> float:
        reward = math.nan if rewards is None else float(rewards[self._player])
        if not math.isfinite(reward):
            raise EnvError(f"{self._config.game} ended with rewards {rewards}; expected a number for {self._player}")
        return reward

    def _play_others(self) -> tuple[bool, str]:
        """Moves of all others until it is the model's turn: (whether the game has ended, what the model is shown)."""
        for _ in range(1000):
            player, observations = self._env.get_observation()
            text = _shown(player, observations)
            if player == self._player:
                return False, text
            is_done, _ = self._env.step(action=self._opponent(text, self._chance))
            if is_done:
                return True, ""
        raise EnvError(f"{self._config.game}: the others moved 1000 times in a row; the model is never asked")

    @contextlib.contextmanager
    def _own_chance(self) -> Iterator[None]:
        outside = random.getstate()
        random.setstate(self._state)
        try:
            yield
        finally:
            self._state = random.getstate()
            random.setstate(outside)


def random_move(observation: str, chance: random.Random) -> str:
    """A move in brackets among those that the observation lists as available, else among all that it mentions.

    >>> random_move("For example [9].\\nAvailable Moves: '[2]', '[5]'", random.Random(1))
    '[2]'
    """
    offered = _OFFERED.findall(observation)
    moves = _MOVE.findall(offered[-1]) if offered else _MOVE.findall(observation)
    return chance.choice(moves) if moves else "[pass]"


def _shown(player: int, observations: Any) -> str:
    """New messages to a player, without the moves that it made itself."""
    if isinstance(observations, str):
        return observations
    lines = [
        str(message)
        for sender, message, kind in observations
        if not (sender == player and kind.name == "PLAYER_ACTION")
    ]
    return "\n".join(lines)


def _seed(seed: int, index: int, split: str) -> int:
    return (seed << 40) + index + ((1 << 62) if split == "held_out" else 0)


def _opening(text: str, index: int, form: str, system: str) -> Problem:
    if form == "plain":
        return Problem(index=index, prompt=f"{text}\n")
    head = ({"role": "system", "content": system},) if system else ()
    return Problem(index=index, messages=(*head, {"role": "user", "content": text}))


def _turn(text: str, form: str, *, reward: float = 0.0, is_done: bool = False, is_truncated: bool = False) -> Turn:
    value = float(reward)
    if not math.isfinite(value):
        raise EnvError(f"a reward of {reward}; expected a finite number")
    if is_done:
        return Turn(reward=value, is_done=True, is_truncated=is_truncated)
    if form == "plain":
        return Turn(text=f"\n{text}\n", reward=value)
    return Turn(messages=({"role": "user", "content": text},), reward=value)
