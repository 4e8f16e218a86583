"""A look at the rows that a run will learn from, before it begins: what is wrong with one is told now, not after hours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lockstep.core.errors import ConfigError, FormatError
from lockstep.learn.data import JsonLines, Renderer, shuffled
from lockstep.learn.packing import Example
from lockstep.learn.session import Session

TOLD_S = 2.0
"""Seconds between two notes of progress."""


def check_rows(
    rows: JsonLines,
    renderer: Renderer,
    read: Callable[[int], Sequence[Example]],
    session: Session,
    *,
    batch: int,
    micro_tokens: int,
) -> None:
    """Render each row once that the rest of the run takes. That costs a fraction of what learning from it does.

    Args:
        read: the examples of a row, which share a micro-batch; none where the row is skipped.
        session: which steps are to come.
        batch: rows of a step.
        micro_tokens: of a forward and backward pass.

    Raises:
        FormatError: a row of another form, or too long; names file and line.
        ConfigError: every row is skipped.
    """
    numbers = _ahead(len(rows), batch, session)
    first: Sequence[Example] = ()
    told = time.monotonic()
    for place, number in enumerate(numbers):
        examples = read(number)
        first = first or examples
        num_tokens = sum(len(example.tokens) for example in examples)
        if num_tokens > micro_tokens:
            raise FormatError(
                f"has {num_tokens} tokens{' in both answers' if len(examples) > 1 else ''}, which go into one micro-batch of "
                f"micro_tokens={micro_tokens}; raise micro_tokens, or cut rows by data.max_tokens and data.too_long",
                path=rows.where(number),
            )
        if time.monotonic() - told > TOLD_S:
            told = time.monotonic()
            session.note({"checked": (place + 1) / len(numbers)})
    some(rows.path, renderer, first)
    renderer.num_skipped = 0


def some(path: Path, renderer: Renderer, examples: Sequence[Example]) -> list[Example]:
    """The examples, if there are any.

    Args:
        path: of their file.

    Raises:
        ConfigError: every row was skipped.
    """
    if not examples:
        raise ConfigError(
            f"every row of {path} has more than {renderer.limit} tokens and is skipped; raise data.max_tokens, or set "
            "data.too_long to cut"
        )
    return list(examples)


def _ahead(num_rows: int, batch: int, session: Session) -> Sequence[int]:
    """Numbers of the rows that are still to come, rising."""
    steps = range(session.step, session.config.total_steps)
    if len(steps) * batch >= num_rows:
        return range(num_rows)
    found: Iterable[int] = (row for step in steps for row in shuffled(num_rows, batch, session.seed, step))
    return sorted(set(found))
