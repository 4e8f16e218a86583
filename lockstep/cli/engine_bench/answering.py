"""The worker's end of `process.py`. Read by the peers' Pythons too, hence nothing but the standard library here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def serve_lines(calls: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers every line of stdin until it ends. Whatever libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        ask = json.loads(line)
        answer = calls[ask.pop("op")](**ask)
        out.write(json.dumps(answer) + "\n")
        out.flush()
