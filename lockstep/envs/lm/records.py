"""Tasks from records: a JSONL file or Python values, judged by mathematics, equality or a function of the user's.

{"question": "6 * 7?", "answer": "6 * 7 = 42 #### 42"}
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from lockstep.core.errors import ConfigError, FormatError, LockstepError
from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm import math_answer
from lockstep.envs.lm.task import Task, check_index, check_share, is_held_out

MATH_SYSTEM = "Solve the problem step by step. End with the final answer in \\boxed{}."


@dataclass(frozen=True, kw_only=True)
class RecordsConfig:
    """Where the records are and how to judge answers to them."""

    path: str = ""
    """A JSONL file. Empty: `records` are handed to `RecordsTask`."""
    prompt_key: str = "question"
    """Field of the prompt: text, or a list of messages."""
    answer_key: str = "answer"
    """Field of the reference answer; a record may lack it where a function judges."""
    judge: str = "math"
    """"math", "math_verify" (extra `math`), "exact" (equal but for blank space around it), or the import path of a
    function `my_module:score` of a `Sample`, which returns a number or a `Score`."""
    split: Literal["all", "train", "held_out"] = "all"
    """Records held out are chosen by their prompt's text, so that repeated prompts stay on one side."""
    held_out_share: float = 0.1
    """Share of the records that is held out, 0 to 1."""
    form: Literal["plain", "chat"] = "chat"
    """Prompts as plain text by `template`, or as messages by the chat template."""
    template: str = "{prompt}\n"
    """What a plain prompt looks like."""
    system: str = ""
    """System message of the chat form; `MATH_SYSTEM` asks for `\\boxed{}`."""
    name: str = ""
    """For tables; the file's name if empty."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a user's function judges."""

    text: str
    """What the model wrote."""
    prompt: str
    """The record's prompt; of messages, the last one's content."""
    answer: str
    """The reference answer; empty where there is none."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The whole record."""


Judge = Callable[[Sample], Any]


@final
class RecordsTask(Task):
    """One problem for each record.

    Args:
        config: where and how.
        records: instead of a file: texts, or mappings with the keys of the config.

    Raises:
        FormatError: a line that is no record; names file and line.
        ConfigError: no records, an unknown judge, both or neither of path and records.

    >>> task = RecordsTask(RecordsConfig(), records=[{"question": "6 * 7?", "answer": "#### 42"}])
    >>> task.score(task.problem(0), "It is 42.0, so the answer is 42.").value
    1.0
    """

    def __init__(self, config: RecordsConfig, records: Iterable[Any] | None = None) -> None:
        if bool(config.path) == (records is not None):
            raise ConfigError(f"path={config.path!r} and records: give exactly one of them")
        check_share(config.held_out_share, "held_out_share")
        self.config = config
        self._judge = find_judge(config.judge)
        rows = read_jsonl(config.path) if records is None else _numbered(records)
        self._rows: Sequence[Mapping[str, Any]] | None = self._select(rows)

    def __reduce__(self) -> tuple[Any, ...]:
        # A verifier gets its problems handed in: a file is read again only where a problem is asked for.
        return _restored, (self.config, None if self.config.path else self._rows)

    @property
    def name(self) -> str:
        return self.config.name or (Path(self.config.path).stem if self.config.path else "records")

    @property
    def num_problems(self) -> int | None:
        return len(self._here())

    def problem(self, index: int) -> Problem:
        check_index(index, self)
        config, record = self.config, self._here()[index]
        prompt = record[config.prompt_key]
        answer = str(record.get(config.answer_key, ""))
        data = {"record": dict(record)}
        if not isinstance(prompt, str):
            return Problem(index=index, messages=tuple(prompt), answer=answer, data=data)
        if config.form == "plain":
            return Problem(index=index, prompt=config.template.replace("{prompt}", prompt), answer=answer, data=data)
        system = ({"role": "system", "content": config.system},) if config.system else ()
        return Problem(index=index, messages=(*system, {"role": "user", "content": prompt}), answer=answer, data=data)

    def score(self, problem: Problem, text: str) -> Score:
        record = problem.data["record"]
        prompt = record[self.config.prompt_key]
        if not isinstance(prompt, str):
            prompt = str(prompt[-1].get("content", ""))
        result = self._judge(Sample(text=text, prompt=prompt, answer=problem.answer, record=record))
        return result if isinstance(result, Score) else Score.of(result)

    def _here(self) -> Sequence[Mapping[str, Any]]:
        if self._rows is None:
            self._rows = self._select(read_jsonl(self.config.path))
        return self._rows

    def _select(self, rows: Iterable[tuple[str, Any]]) -> list[Mapping[str, Any]]:
        config, kept, count = self.config, [], 0
        for place, row in rows:
            record = {config.prompt_key: row} if isinstance(row, str) else row
            self._check(place, record)
            count += 1
            text = json.dumps(record[config.prompt_key], sort_keys=True)
            if config.split == "all" or is_held_out(text, config.held_out_share) == (config.split == "held_out"):
                kept.append(record)
        if not kept:
            raise ConfigError(
                f"{self.name}: no problem in split {config.split!r} of {count} records; give more, or another held_out_share "
                f"than {config.held_out_share:g} (each is held out by a hash of its prompt)"
            )
        return kept

    def _check(self, place: str, record: Any) -> None:
        config = self.config
        if not isinstance(record, Mapping):
            raise FormatError(f"a record is {type(record).__name__}; expected an object", path=place)
        keys = [config.prompt_key] + ([config.answer_key] if config.judge in JUDGES else [])
        for key in keys:
            if key not in record:
                known = ", ".join(map(repr, record)) or "none"
                raise FormatError(f"no field {key!r}; the record has {known}. Set prompt_key, answer_key", path=place)
        prompt = record[config.prompt_key]
        is_chat = isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt)
        if not (isinstance(prompt, str) or is_chat):
            raise FormatError(
                f"{config.prompt_key!r} is {prompt!r:.80}; expected text or a list of messages", path=place
            )
        if config.judge in ("math", "math_verify") and not str(record[config.answer_key]).strip():
            raise FormatError(f"{config.answer_key!r} is empty, so nothing could be right", path=place)


def read_jsonl(path: str) -> Iterable[tuple[str, Any]]:
    """("path:line", value) of each line that is not blank.

    Raises:
        FormatError: the file cannot be read, or a line is no JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}:{number}", json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise FormatError(f"not JSON: {error}", path=f"{path}:{number}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot be read: {error}", path=path) from error


def math_judge(sample: Sample) -> Score:
    """1 if the final answer declared in the text, or failing that its last number, is the reference's."""
    expected = math_answer.final_answer(sample.answer) or sample.answer.strip()
    declared = math_answer.final_answer(sample.text)
    got = declared if declared is not None else math_answer.last_number(sample.text)
    if got is None:
        return Score.of(0.0, f"no answer found; expected {expected!r:.200}")
    is_same = math_answer.same_answer(expected, got)
    return Score.of(float(is_same), "" if is_same else f"expected {expected!r:.200}, got {got!r:.200}")


def math_verify_judge(sample: Sample) -> Score:
    """As `math_judge`, and where that says no, the library math-verify is asked."""
    score = math_judge(sample)
    got = math_answer.final_answer(sample.text)
    if score.value == 1 or got is None:
        return score
    expected = math_answer.final_answer(sample.answer) or sample.answer.strip()
    return Score.of(float(math_answer.verified_by_math_verify(expected, got)), score.detail)


def exact_judge(sample: Sample) -> Score:
    """1 if the text is the reference answer but for blank space around it."""
    return Score.of(float(sample.text.strip() == sample.answer.strip()))


JUDGES: Mapping[str, Judge] = {"math": math_judge, "math_verify": math_verify_judge, "exact": exact_judge}


def find_judge(name: str) -> Judge:
    """A judge by its name in `JUDGES` or by import path."""
    if name in JUDGES:
        return JUDGES[name]
    found = find_object(name, f"judge; known: {', '.join(JUDGES)}, or my_module:score")
    if not callable(found):
        raise ConfigError(f"{name!r} is {type(found).__name__}, not a function of a sample")
    return found


def find_object(path: str, what: str) -> Any:
    """The object at an import path `module:name`.

    Raises:
        ConfigError: no such module or name.
    """
    module_name, _, names = path.partition(":")
    if not module_name or not names:
        raise ConfigError(f"{path!r} is no {what}")
    try:
        found = importlib.import_module(module_name)
        for name in names.split("."):
            found = inspect.getattr_static(found, name) if inspect.isclass(found) else found.__dict__[name]
    except LockstepError:
        raise
    except (KeyError, AttributeError) as error:
        raise ConfigError(f"module {module_name!r} has no {names!r}; expected a {what}") from error
    except Exception as error:  # whatever the user's module does while it is imported
        raise ConfigError(
            f"{path!r} cannot be imported ({type(error).__name__}: {error}); expected a {what}"
        ) from error
    return found


def _numbered(records: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    return ((f"records[{number}]", record) for number, record in enumerate(records))


def _restored(config: RecordsConfig, rows: Sequence[Mapping[str, Any]] | None) -> RecordsTask:
    task = RecordsTask.__new__(RecordsTask)
    task.config, task._judge, task._rows = config, find_judge(config.judge), rows
    return task
