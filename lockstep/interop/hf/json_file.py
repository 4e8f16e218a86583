"""JSON files that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lockstep.core.errors import FormatError

MAX_BYTES = 1 << 27


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FormatError: unreadable, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FormatError(f"is larger than {MAX_BYTES} bytes, which no such file is", path=str(path))
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=str(path)) from error
    # Deep nesting exhausts the parser's stack before anything else notices.
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"is not JSON: {error}", path=str(path)) from error
    if not isinstance(value, dict):
        raise FormatError(f"holds a {type(value).__name__}, expected an object", path=str(path))
    return value
