"""Programming problems: the model's program is run against tests in a sandbox.

{"prompt": "Write f(x) = x + 1", "tests": ["assert f(1) == 2"], "solution": "def f(x): return x + 1"}
{"prompt": "Print twice the number.", "tests": [{"input": "21", "output": "42"}], "solution": "print(int(input()) * 2)"}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from lockstep.core.errors import ConfigError, FormatError
from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.records import read_jsonl
from lockstep.envs.lm.sandbox import SandboxConfig, run_program
from lockstep.envs.lm.task import Task, check_index, check_share, is_held_out

_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class CodeConfig:
    """Where the problems are and what a program may take."""

    path: str = ""
    """A JSONL file. Empty: `records` are handed to `CodeTask`."""
    prompt_key: str = "prompt"
    """Field of the prompt, a text."""
    tests_key: str = "tests"
    """Field of the tests: statements that raise where the program is wrong, or objects with `input` and `output` (texts
    of standard input and output, compared line by line but for blank space at the end of each)."""
    solution_key: str = "solution"
    """Field of a reference program; a record may lack it."""
    split: Literal["all", "train", "held_out"] = "all"
    """Records held out are chosen by their prompt's text, so that repeated prompts stay on one side."""
    held_out_share: float = 0.1
    """Share of the records that is held out, 0 to 1."""
    reward: Literal["all", "share"] = "all"
    """1 if all tests pass and else 0, or the share of tests that pass."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Limits of each run: one for all statements (with "share", one for each), one for each input."""
    system: str = "Answer with one Python program in a ```python block."
    """System message; empty for none."""
    name: str = "code"
    """For tables."""


@final
class CodeTask(Task):
    """One problem for each record.

    Raises:
        FormatError: a line that is no record; names file and line.
        ConfigError: both or neither of path and records, or no records.
    """

    def __init__(self, config: CodeConfig, records: Iterable[Any] | None = None) -> None:
        if bool(config.path) == (records is not None):
            raise ConfigError(f"path={config.path!r} and records: give exactly one of them")
        check_share(config.held_out_share, "held_out_share")
        self.config = config
        numbered = ((f"records[{number}]", record) for number, record in enumerate(records or ()))
        self._rows: Sequence[Mapping[str, Any]] | None = _checked(
            read_jsonl(config.path) if records is None else numbered, config
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.config, None if self.config.path else self._rows)

    @property
    def name(self) -> str:
        return Path(self.config.path).stem if self.config.path else self.config.name

    @property
    def num_problems(self) -> int | None:
        return len(self._here())

    def problem(self, index: int) -> Problem:
        check_index(index, self)
        record = self._here()[index]
        system = ({"role": "system", "content": self.config.system},) if self.config.system else ()
        solution = record.get(self.config.solution_key)
        return Problem(
            index=index,
            messages=(*system, {"role": "user", "content": record[self.config.prompt_key]}),
            answer=f"```python\n{solution.rstrip()}\n```" if solution else "",
            data={"tests": record[self.config.tests_key]},
        )

    def score(self, problem: Problem, text: str) -> Score:
        program = program_of(text)
        tests: Sequence[Any] = problem.data["tests"]
        statements = [test for test in tests if isinstance(test, str)]
        runs: list[tuple[str, str | None, str]] = [
            (test["input"], test["output"], "") for test in tests if test not in statements
        ]
        if self.config.reward == "share":
            runs += [("", None, statement) for statement in statements]
        elif statements:
            runs.append(("", None, "\n".join(statements)))
        passed, detail = 0, ""
        for stdin, expected, statements_now in runs:
            why = self._fault(program, stdin, expected, statements_now)
            passed += not why
            detail = detail or why
            if why and self.config.reward == "all":
                return Score.of(0.0, why)
        return Score.of(passed / len(runs), detail)

    def _here(self) -> Sequence[Mapping[str, Any]]:
        if self._rows is None:
            self._rows = _checked(read_jsonl(self.config.path), self.config)
        return self._rows

    def _fault(self, program: str, stdin: str, expected: str | None, tests: str) -> str:
        """Why a run does not pass; empty if it does."""
        run = run_program(program, self.config.sandbox, stdin=stdin, tests=tests)
        if not run.is_finished:
            return run.detail
        if expected is not None and _lines(run.output) != _lines(expected):
            return f"printed {run.output!r:.200}; expected {expected!r:.200}"
        return ""


def program_of(text: str) -> str:
    """The last Python block of an answer; the whole answer if it has none.

    >>> program_of("Here:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _checked(rows: Iterable[tuple[str, Any]], config: CodeConfig) -> list[Mapping[str, Any]]:
    records = []
    count = 0
    for place, record in rows:
        _check(place, record, config)
        count += 1
        if config.split == "all" or is_held_out(record[config.prompt_key], config.held_out_share) == (
            config.split == "held_out"
        ):
            records.append(record)
    if not records:
        raise ConfigError(
            f"{config.path or 'records'}: no problem in split {config.split!r} of {count} records; give more, or another "
            f"held_out_share than {config.held_out_share:g} (each is held out by a hash of its prompt)"
        )
    return records


def _check(place: str, record: Any, config: CodeConfig) -> None:
    if not isinstance(record, Mapping):
        raise FormatError(f"a record is {type(record).__name__}; expected an object", path=place)
    if not isinstance(record.get(config.prompt_key), str):
        raise FormatError(f"field {config.prompt_key!r} must be text; the record has {list(record)}", path=place)
    tests = record.get(config.tests_key)
    if not isinstance(tests, list) or not tests:
        raise FormatError(f"field {config.tests_key!r} must be a list of one or more tests", path=place)
    for test in tests:
        is_pair = isinstance(test, Mapping) and all(isinstance(test.get(key), str) for key in ("input", "output"))
        if not (is_pair or isinstance(test, str)):
            raise FormatError(
                f"test {test!r:.80}: expected a statement, or an object of texts input, output", path=place
            )


def _restored(config: CodeConfig, rows: Sequence[Mapping[str, Any]] | None) -> CodeTask:
    task = CodeTask.__new__(CodeTask)
    task.config, task._rows = config, rows
    return task
