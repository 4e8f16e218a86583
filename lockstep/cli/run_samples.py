"""`lockstep runs show RUN --samples`: what a language model wrote, and what was made of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from lockstep.core.errors import CheckpointError
from lockstep.runs.console import number_text
from lockstep.runs.jsonl import read_jsonl

Pick = Literal["newest", "best", "worst"]


def choose(samples: Sequence[dict[str, Any]], pick: Pick, step: int | None, num: int) -> list[dict[str, Any]]:
    """At most `num` samples: the newest steps' last of all, or the best or worst rewards first, the newest of equals first.

    Samples that were not judged are the worst.

    Raises:
        CheckpointError: no samples of this step.
    """
    steps = sorted({sample["step"] for sample in samples})
    if step is not None:
        samples = [sample for sample in samples if sample["step"] == step]
        if not samples:
            raise CheckpointError(f"no samples of step {step}; the run has those of steps {steps[0]} to {steps[-1]}")
    if pick == "newest":
        return list(samples[-num:])

    def reward(sample: dict[str, Any]) -> float:
        return -float("inf") if sample["reward"] is None else float(sample["reward"])

    newest_first = list(reversed(samples))
    return sorted(newest_first, key=reward, reverse=pick == "best")[:num]


def print_samples(path: Path, console: Console, pick: Pick, step: int | None, num: int) -> None:
    """Samples under the problem that they answer.

    Raises:
        CheckpointError: the run has none, or the file is damaged.
    """
    samples = read_jsonl(path)
    if not samples:
        raise CheckpointError(f"{path} has no samples yet; only reinforcement of language models writes them")
    try:
        chosen = choose(samples, pick, step, num)
        for (number, problem), some in groupby(chosen, lambda one: (one["step"], one["problem"])):
            _print_problem(console, number, problem, list(some))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: a sample without {error}") from error


def _print_problem(console: Console, step: int, problem: int, samples: Sequence[dict[str, Any]]) -> None:
    first = samples[0]
    console.print(f"[bold]step {step:,}[/]  problem {problem}")
    console.print(Padding(escape(visible(first["prompt"], lines=True)), (0, 0, 0, 2), expand=False))
    if first["answer"]:
        console.print(f"  [bright_black]reference[/] {escape(visible(first['answer']))}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("sample", "reward", "advantage", "mismatch", "versions", "tokens"):
        table.add_column(name, justify="right", header_style="bright_black", no_wrap=True)
    table.add_column("text", header_style="bright_black", overflow="fold")
    for sample in samples:
        table.add_row(*map(str, _numbers(sample)), _text(sample))
    console.print(Padding(table, (0, 0, 1, 2), expand=False))


def _numbers(sample: dict[str, Any]) -> Iterable[str]:
    yield str(sample["sample"])
    reward = sample["reward"]
    style = "yellow" if reward is None else "green" if reward >= 1.0 else "red" if reward <= 0.0 else ""
    shown = sample["verdict"] if reward is None else number_text(reward)
    yield f"[{style}]{shown}[/]" if style else shown
    advantage, mismatch = sample.get("advantage"), sample.get("mismatch")
    yield "-" if advantage is None else f"{advantage:+.2f}"
    yield "-" if mismatch is None else number_text(mismatch)
    versions = sample.get("versions", [])
    yield "-" if not versions else str(versions[0]) if len(versions) == 1 else f"{versions[0]}-{versions[-1]}"
    turns = f" in {sample['turns']}" if sample["turns"] > 1 else ""
    yield f"{sample['tokens']}{'+' if sample['truncated'] else ''}{turns}"


def _text(sample: dict[str, Any]) -> str:
    detail = f"  [bright_black]{escape(visible(sample['detail']))}[/]" if sample["detail"] else ""
    return escape(visible(sample["text"])) + detail


def visible(text: str, *, lines: bool = False) -> str:
    r"""Text that cannot move a terminal's cursor: control characters are written as escapes, line ends too unless kept.

    >>> print(visible("a\x1b[2Jb\n\t"))
    a\x1b[2Jb\n\t
    """
    return "".join(
        one if one.isprintable() or (lines and one == "\n") else one.encode("unicode_escape").decode() for one in text
    )
