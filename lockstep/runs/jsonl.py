"""One JSON object a line, appended; the last line may be half written when the writer was killed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lockstep.core.errors import CheckpointError


def json_line(record: dict[str, Any]) -> str:
    """A record as one line of strict JSON. NaN and infinities become null, their keys stay.

    >>> json_line({"step": 1, "loss": float("nan")})
    '{"step": 1, "loss": null}\\n'
    """
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete records of a file; [] if there is no file. A half-written last line is left out.

    Raises:
        CheckpointError: a line before the last is not a JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = content.split(b"\n")
    return [_parse(path, number, line) for number, line in enumerate(lines[:-1], 1) if line]


def last_record(path: Path) -> dict[str, Any] | None:
    """The last complete record, read from the end of the file; None if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            span = 1 << 14
            while True:
                file.seek(max(0, size - span))
                lines = file.read().split(b"\n")
                whole = lines[:-1] if span >= size else lines[1:-1]
                whole = [line for line in whole if line]
                if whole:
                    return _parse(path, -1, whole[-1])
                if span >= size:
                    return None
                span *= 8
    except FileNotFoundError:
        return None


def truncate_after(path: Path, step: int) -> int:
    """Drop records whose "step" is beyond `step`, and a half-written last line. The file is replaced atomically.

    Returns:
        Number of complete records dropped.
    """
    if not path.exists():
        return 0
    records = read_jsonl(path)
    try:
        kept = [record for record in records if record["step"] <= step]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: a record without a numeric `step` ({error!r}): the file is damaged") from error
    scratch = path.with_name(path.name + ".writing")
    scratch.write_text("".join(json_line(record) for record in kept))
    os.replace(scratch, path)
    return len(records) - len(kept)


def trim_partial_line(path: Path) -> None:
    """Remove what follows the last line end, so that an append starts on a line of its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        complete = content.rfind(b"\n") + 1
        if complete != len(content):
            file.truncate(complete)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"{path} line {number}: not JSON ({error}): the file is damaged") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} line {number}: expected a JSON object, got {line[:60]!r}: the file is damaged")
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
