"""What the documents show, runs: Python blocks are executed, command lines are parsed, files exist."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tyro

from lockstep.cli.bench import BENCHES
from lockstep.cli.doctor import Report
from lockstep.cli.main import VERBS
from lockstep.cli.model_words import names_language_model
from lockstep.cli.quickstart import QUICKSTARTS
from lockstep.cli.train import Output, overridden
from lockstep.core.errors import LockstepError
from lockstep.recipes import RECIPES, recipe
from lockstep.rl.algorithms import ALGORITHMS, is_language

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (lockstep .*)$", re.MULTILINE)
SAVED_AS = re.compile(r"^# (\w+\.py)\n")


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return BLOCK.findall(path.read_text())


def commands(path: Path) -> list[str]:
    """Every `lockstep ...` line of blocks without a programming language, comments cut off."""
    lines = INDENTED.findall(path.read_text())
    for language, text in blocks(path):
        if language in ("", "sh", "bash", "console"):
            lines += [line.removeprefix("$ ") for line in text.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.removeprefix("$ ").startswith("lockstep ")]


def check_command(line: str) -> None:
    """Parse a command line as its verb would, without doing anything.

    Raises:
        ValueError, SystemExit, LockstepError: the verb, a flag or a value is wrong.
    """
    _, *args = shlex.split(line)
    verb = args[0] if args else ""
    if verb not in VERBS:
        raise ValueError(f"unknown verb in {line!r}")
    PARSERS[verb](args[1:])


def _train(args: Sequence[str]) -> None:
    if args[0] in ("--list", "--resume", "--help"):
        assert len(args) == (2 if args[0] == "--resume" else 1), args
        return
    overridden(args[0], Output, args[1:], "lockstep train")


def _bench(args: Sequence[str]) -> None:
    module = importlib.import_module(BENCHES[args[0]][0])
    kinds = [kind for name, kind in vars(module).items() if "Bench" in name and name.endswith("Args")]
    tyro.cli(kinds[0], args=list(args[1:]))


def _quickstart(args: Sequence[str]) -> None:
    assert all(name in QUICKSTARTS for name in args), f"no such quickstart: {args}"


def _runs(args: Sequence[str]) -> None:
    module = importlib.import_module("lockstep.cli.runs")
    verbs = {"list": module.ListRuns, "show": module.ShowRun, "compare": module.CompareRuns, "plot": module.PlotRuns}
    tyro.extras.subcommand_cli_from_dict(verbs, args=list(args))


def _dataclass(module: str, name: str) -> Callable[[Sequence[str]], Any]:
    return lambda args: tyro.cli(vars(importlib.import_module(module))[name], args=list(args))


def _eval(args: Sequence[str]) -> Any:
    module, name = ("evaluate_language", "LanguageEvalArgs") if "grpo" in args[0] else ("evaluate", "EvalArgs")
    return _dataclass(f"lockstep.cli.{module}", name)(args)


def _serve(args: Sequence[str]) -> Any:
    is_language = any(names_language_model(argument) for argument in args)
    module, name = ("serve_language", "ServeLanguageArgs") if is_language else ("serve", "ServeArgs")
    return _dataclass(f"lockstep.cli.{module}", name)(args)


def _doctor(args: Sequence[str]) -> Any:
    if args[0] in RECIPES and is_language(recipe(args[0])):
        return overridden(args[0], Report, args[1:], "lockstep doctor")
    return _dataclass("lockstep.cli.doctor", "DoctorArgs")(args)


def _caffe(args: Sequence[str]) -> Any:
    module = importlib.import_module("lockstep.cli.caffe")
    verbs = {"train": module.TrainArgs, "test": module.TestArgs, "time": module.TimeArgs}
    return tyro.cli(verbs[args[0]], args=list(args[1:]))


PARSERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "train": _train,
    "bench": _bench,
    "runs": _runs,
    "eval": _eval,
    "play": _dataclass("lockstep.cli.play", "PlayArgs"),
    "serve": _serve,
    "chat": _dataclass("lockstep.cli.chat", "ChatArgs"),
    "generate": _dataclass("lockstep.cli.generate", "GenerateArgs"),
    "caffe": _caffe,
    "pull": _dataclass("lockstep.cli.store_args", "PullArgs"),
    "list": _dataclass("lockstep.cli.store_args", "ListArgs"),
    "show": _dataclass("lockstep.cli.store_args", "NameArgs"),
    "rm": _dataclass("lockstep.cli.store_args", "NameArgs"),
    "convert": _dataclass("lockstep.cli.convert", "ConvertArgs"),
    "export": _dataclass("lockstep.cli.export", "ExportArgs"),
    "compress": _dataclass("lockstep.cli.compress", "CompressArgs"),
    "import": _dataclass("lockstep.cli.import_file", "ImportArgs"),
    "doctor": _doctor,
    "quickstart": _quickstart,
}

LINES = sorted({line for path in DOCUMENTS for line in commands(path)})


def test_every_verb_has_a_parser() -> None:
    assert set(PARSERS) == set(VERBS)
    assert {line.split()[1] for line in LINES} >= {"train", "eval", "play", "serve", "export", "runs", "doctor"}


@pytest.mark.parametrize("line", LINES)
def test_command_line_parses(line: str) -> None:
    if line.endswith("--help"):
        with pytest.raises(SystemExit, match="0"):
            check_command(line)
    else:
        check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "lockstep evaluate run",
        "lockstep train ppo-cartpol",
        "lockstep train ppo-cartpole --run.sed 3",
        "lockstep train ppo-cartpole --run.seed three",
        "lockstep eval run --epsodes 3",
        "lockstep export run --portable yes",
        "lockstep runs draw",
        "lockstep serve run --prt 1",
    ],
)
def test_wrong_command_lines_are_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, SystemExit, LockstepError)) as caught:
        check_command(line)
    assert not (isinstance(caught.value, SystemExit) and caught.value.code == 0)


WITH_PYTHON = [path for path in DOCUMENTS if any(language == "python" for language, _ in blocks(path))]


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(p, id=p.name) for p in WITH_PYTHON])
def test_python_blocks_run(path: Path, tmp_path: Path) -> None:
    """In order, in one process. A block that begins with `# NAME.py` is a file of that name."""
    parts = []
    for language, text in blocks(path):
        if language != "python":
            continue
        if saved := SAVED_AS.match(text):
            (tmp_path / saved[1]).write_text(text)
        else:
            parts.append(text)
    (tmp_path / "document.py").write_text("\n".join(parts))
    done = subprocess.run([sys.executable, "document.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_algorithm_and_file_is_named() -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text()
    for config, _ in ALGORITHMS.values():
        assert config.__module__.replace(".", "/") + ".py" in text
    named = re.findall(r"`((?:lockstep|tests)/[\w./]+)`", "\n".join(path.read_text() for path in DOCUMENTS))
    assert [name for name in named if not (ROOT / name).exists()] == []
    recipes = re.findall(r"lockstep train ([a-z0-9-]+)", text)
    assert set(recipes) <= set(RECIPES)
    assert {name.split("-")[0] for name in RECIPES} <= {name.split("-")[0] for name in recipes}
