"""Operations by name, each a function of (call, *inputs) that returns one value or a tuple.

`OPS` work on tensors (and take a `Host` where they read integers), `HOST` on Python numbers alone (or return
`NotImplemented`), `CONTROL` also see the values around them: (call, scope, *inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lockstep.models.graph.ops import elementwise, host, index, linear, shape

Function = Callable[..., Any]

OPS: dict[str, Function] = {
    **elementwise.OPS,
    **index.OPS,
    **linear.OPS,
    **shape.OPS,
}

HOST: dict[str, Function] = host.OPS

CONTROL: dict[str, Function] = {}

__all__ = ["CONTROL", "HOST", "OPS", "Function"]
