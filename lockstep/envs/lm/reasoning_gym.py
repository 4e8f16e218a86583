"""reasoning-gym's generators as a task: any of them, its difficulty options, its curriculum's levels.

Source: https://github.com/open-thought/reasoning-gym. A generator's n-th problem is drawn from `Random(seed + n)`, so
its streams for seeds 0 and 1 are one stream shifted by one; here seeds lie 2^64 apart.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, final

from lockstep.core.errors import ConfigError, InputError, unknown_name
from lockstep.core.extras import require
from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.math_answer import quantity
from lockstep.envs.lm.steady import has_steady_hashes, steady_drawer
from lockstep.envs.lm.task import LevelledTask, check_share, split_index

NO_REFERENCE = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
"""Generators whose problems bring no reference answer, or one that their verifier does not take: it checks instead."""

MALFORMED: Mapping[str, tuple[type[Exception], ...]] = {
    "boxnet": (TypeError, AttributeError, KeyError),
    "game_of_life": (TypeError, KeyError, IndexError),
    "prime_factorization": (ValueError,),
}
"""What a generator's verifier raises at an answer that it cannot read. Such an answer is wrong, not a failure."""

# Generators that build all their problems at once, or take indices up to a limit: how many problems one of them holds.
_SIZES = {"acre": 500, "gsm_symbolic": 1 << 16, "list_functions": 1 << 16, "pool_matrix": 1 << 30}
# Generators that draw from Python's one global generator as well as from their own.
_GLOBAL = ("list_functions",)
# Generators that choose from sets of strings, whose order is another in every process.
_HASHED = (
    "intermediate_integration",
    "isomorphic_strings",
    "knight_swap",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)
_ENDLESS = 1 << 62
_SEED_STRIDE = 1 << 64
_SEED_LIMIT = 1 << 31
_MAX_DRAWS = 1000
_TAG = re.compile(r"<answer>\s?(.*?)\s?</answer>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ReasoningGymConfig:
    """One generator."""

    generator: str
    """Its name, such as `chain_sum`; `generators()` lists them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its difficulty, such as `{"min_terms": 2, "max_terms": 3}`. Holds at every level, but for `attributes`."""
    has_levels: bool = False
    """Take difficulty from the generator's own curriculum, as far as the generator accepts its levels."""
    attributes: tuple[str, ...] = ()
    """Attributes of that curriculum that rise with the level, whatever `options` say of them; the others stay at their
    first. None named: all that `options` do not fix."""
    seed: int = 0
    """Of the problems: each takes its own from this one."""
    split: Literal["train", "held_out"] = "train"
    """Which questions: those held out are never met in training, whatever the seeds, indices and levels, because the
    question's own text decides."""
    held_out_share: float = 0.2
    """Share of all questions that is held out. Drawing one costs 1 / share generated questions."""
    form: Literal["plain", "chat"] = "plain"
    """Prompts as plain text by `template`, or as messages by the chat template."""
    template: str = "{question}\n"
    """What a plain prompt looks like."""
    system: str = (
        "Solve the problem. Think first if it helps; then write the final answer, and nothing else, between <answer> and "
        "</answer>."
    )
    """System message of the chat form; empty for none."""
    answer_in: Literal["auto", "text", "tag", "last_line"] = "auto"
    """Where the answer stands: the whole text, the last <answer> tag, or the last line that is not blank. "auto": text
    for plain prompts, tag for chat."""


@final
class ReasoningGymTask(LevelledTask):
    """Problems of one generator, judged by its own verifier.

    Raises:
        ConfigError: an unknown generator, option or value.
        MissingExtraError: reasoning-gym is not installed.

    >>> task = ReasoningGymTask(ReasoningGymConfig(generator="count_bits"))  # doctest: +SKIP
    >>> task.score(task.problem(3), task.problem(3).answer).value  # doctest: +SKIP
    1.0
    """

    def __init__(self, config: ReasoningGymConfig) -> None:
        self.config = config
        check_share(config.held_out_share, "held_out_share")
        if config.split == "held_out" and config.held_out_share == 0:
            raise ConfigError("split='held_out' with held_out_share=0 holds no question; give it a share above 0")
        if config.form == "plain" and "{question}" not in config.template:
            raise ConfigError(f"template={config.template!r} has no place for {{question}}")
        if config.attributes and not config.has_levels:
            raise ConfigError(f"attributes={config.attributes} rise with the level; that needs has_levels=True")
        self._levels = _num_levels(config) if config.has_levels else 1
        self._dataset = lru_cache(maxsize=8)(self._build)
        self._dataset(0, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return ReasoningGymTask, (self.config,)

    @property
    def name(self) -> str:
        return self.config.generator

    @property
    def num_problems(self) -> int | None:
        return None

    def skill(self, position: int) -> str:
        return self.config.generator

    def num_levels(self, skill: str) -> int:
        return self._levels

    def problem(self, index: int) -> Problem:
        level, position = split_index(index)
        if index < 0 or level >= self._levels:
            raise InputError(f"{self.name}: index {index} is of level {level}; levels are 0 to {self._levels - 1}")
        if self.name in _HASHED and not has_steady_hashes():
            return steady_drawer().draw(self.config, index)
        entry = self._entry(level, position)
        question = str(entry["question"])
        answer = "" if entry["answer"] is None else str(entry["answer"])
        data = {"entry": entry, "level": level}
        if self.config.form == "plain":
            prompt = self.config.template.replace("{question}", question)
            return Problem(index=index, prompt=prompt, answer=answer, data=data)
        system = ({"role": "system", "content": self.config.system},) if self.config.system else ()
        target = f"<answer>{answer}</answer>" if self._answer_in == "tag" else answer
        messages = (*system, {"role": "user", "content": question})
        return Problem(index=index, messages=messages, answer=target, data=data)

    def score(self, problem: Problem, text: str) -> Score:
        answer = self._extract(text)
        entry = problem.data["entry"]
        if self.name in _CORRECTED:
            return Score.of(float(answer is not None and _CORRECTED[self.name](answer.strip(), str(entry["answer"]))))
        try:
            value = self._dataset(problem.data["level"], 0).score_answer(answer, entry)
        except MALFORMED.get(self.name, ()) as error:
            return Score.of(0.0, f"unreadable answer: {error}")
        return Score.of(value, "no <answer> tag" if answer is None else "")

    @property
    def _answer_in(self) -> str:
        if self.config.answer_in == "auto":
            return "text" if self.config.form == "plain" else "tag"
        return self.config.answer_in

    def _extract(self, text: str) -> str | None:
        if self._answer_in == "tag":
            found = _TAG.findall(text)
            return found[-1].strip() if found else None
        lines = [line for line in text.splitlines() if line.strip()]
        return (text if self._answer_in == "text" or not lines else lines[-1]).strip()

    def _entry(self, level: int, position: int) -> dict[str, Any]:
        """The first question of this split among those drawn for a position."""
        is_held_out = self.config.split == "held_out"
        share = self.config.held_out_share if is_held_out else 1 - self.config.held_out_share
        step = math.ceil(8 / share)  # one position in e^8 has to look among its neighbour's questions
        for draw in range(_MAX_DRAWS):
            chunk, row = divmod(position * step + draw, _SIZES.get(self.name, _ENDLESS))
            entry = self._draw(level, chunk, row)
            if (_fraction(str(entry["question"])) < self.config.held_out_share) == is_held_out:
                return entry
        raise ConfigError(
            f"{self.name}: {_MAX_DRAWS} draws gave no question of split {self.config.split!r}; its options leave too few "
            f"questions for held_out_share={self.config.held_out_share}"
        )

    def _draw(self, level: int, chunk: int, row: int) -> dict[str, Any]:
        dataset = self._dataset(level, chunk)
        if self.name not in _GLOBAL:
            return dataset[row]
        state = random.getstate()
        random.seed(f"{self.config.seed}/{chunk}/{row}")
        try:
            return dataset[row]
        finally:
            random.setstate(state)

    def _build(self, level: int, chunk: int) -> Any:
        first = self.config.seed * _SEED_STRIDE
        if self.name in _SIZES:
            size = _SIZES[self.name]
            placed = {"seed": (first + chunk * size) % _SEED_LIMIT, "size": size}
        else:
            placed = {"seed": first}
        dataset = build_dataset(self.config, level, placed)
        if self.name not in _SIZES:
            dataset.size = _ENDLESS  # word_ladder looks at it, and takes no large one in its options
        return dataset


def _same_text(answer: str, expected: str) -> bool:
    return answer == expected


def _same_number(answer: str, expected: str) -> bool:
    got = quantity(answer)
    return got is not None and abs(got.value - Fraction(expected)) <= Fraction(1, 10_000)


# Verifiers of reasoning-gym 0.1.25 that reward what is wrong: game_of_life_halting compares the truth of two texts, so any
# text is right; coin_flip compares as many characters as the shorter number has, so "0" is right for 0.3125.
_CORRECTED: Mapping[str, Callable[[str, str], bool]] = {"game_of_life_halting": _same_text, "coin_flip": _same_number}


def generators() -> list[str]:
    """Names of all generators; reasoning-gym's `composite` is `CompositeTask` here."""
    return sorted(set(_factory().DATASETS) - {"composite"})


def build_dataset(config: ReasoningGymConfig, level: int, placed: Mapping[str, Any]) -> Any:
    """A generator's data set.

    Args:
        level: of its curriculum, where that is asked for.
        placed: seed and size.

    Raises:
        ConfigError: an unknown name or option, or a value that the generator refuses.
    """
    dataset, kind = _generator(config.generator)
    try:
        return dataset(config=kind(**{**_difficulty(config, level), **placed}))  # which validates
    except (AssertionError, ValueError, TypeError) as error:
        raise _refused(config, level, error) from error


def _difficulty(config: ReasoningGymConfig, level: int) -> dict[str, Any]:
    """Values of the generator's own config."""
    name, options = config.generator, dict(config.options)
    fields = [item.name for item in dataclasses.fields(_generator(name)[1])]
    for option in options:
        if option not in fields or option in ("seed", "size"):
            raise ConfigError(f"{name}: {unknown_name('option', option, set(fields) - {'seed', 'size'})}")
    if not config.has_levels:
        return options
    curriculum = _curriculum(name)
    for attribute, steps in _rising(config).items():
        curriculum.set_attr_level(attribute, min(level, steps - 1))
    levelled = curriculum.generate_configuration()
    taken = {field for attribute in config.attributes for field in _fields(curriculum.attributes[attribute])}
    kept = {option: value for option, value in options.items() if option not in taken}
    return {field: levelled.__dict__[field] for field in fields} | kept


def _rising(config: ReasoningGymConfig) -> dict[str, int]:
    """Attributes of the curriculum that rise, and how many levels each has."""
    known = _curriculum(config.generator).attributes
    for name in config.attributes:
        if name not in known:
            raise ConfigError(f"{config.generator}: {unknown_name('attribute of its curriculum', name, known)}")
    free = [name for name, entry in known.items() if not set(_fields(entry)) & set(config.options)]
    return {name: len(known[name].levels) for name in config.attributes or free}


def _fields(attribute: Any) -> list[str]:
    """Fields of the generator's config that an attribute sets: one, or the ends of a range."""
    names = ("field_name", "lower_field_name", "upper_field_name")
    return [attribute.__dict__[name] for name in names if name in attribute.__dict__]


def _num_levels(config: ReasoningGymConfig) -> int:
    """Levels up to the first that the generator refuses: some curricula of reasoning-gym 0.1.25 go further than that."""
    kind, num = _generator(config.generator)[1], max(_rising(config).values(), default=1)
    validate = kind.__dict__.get("validate", lambda made: None)  # two generators refuse nothing
    for level in range(1, num):
        try:
            validate(kind(**_difficulty(config, level)))
        except (AssertionError, ValueError, TypeError):
            return level
    return num


def _refused(config: ReasoningGymConfig, level: int, error: Exception) -> ConfigError:
    of = f" at level {level}" if config.has_levels else ""
    return ConfigError(f"{config.generator} refuses options {dict(config.options)}{of}: {error}")


def _generator(name: str) -> tuple[Any, Any]:
    known = generators()
    if name not in known:
        raise ConfigError(unknown_name("generator", name, known))
    return _factory().DATASETS[name]


def _curriculum(name: str) -> Any:
    _generator(name)
    if not _factory().has_curriculum(name):
        raise ConfigError(f"{name} has no curriculum; use has_levels=False and options")
    return _factory().create_curriculum(name)


def _factory() -> Any:
    require("reasoning_gym", extra="reasoning")
    return require("reasoning_gym.factory", extra="reasoning")


def _fraction(question: str) -> float:
    """A number from 0 up to 1 that the text decides."""
    return zlib.crc32(question.encode("utf-8", errors="surrogatepass")) / 2**32
