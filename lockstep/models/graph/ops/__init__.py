"""Operations by name, each a function of (call, *inputs) that returns one value or a tuple.

`OPS` work on tensors (and take a `Host` where they read integers), `HOST` on Python numbers alone (or return
`NotImplemented`), `CONTROL` also see the values around them: (call, scope, *inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lockstep.models.graph.ops import (
    aten,
    attention,
    cast,
    classic,
    control,
    conv,
    draws,
    elementwise,
    host,
    image,
    index,
    linear,
    loss,
    norm,
    pool,
    quant,
    recurrent,
    reduce,
    resize,
    sequence,
    shape,
    signal,
    text,
)

Function = Callable[..., Any]

OPS: dict[str, Function] = {
    **aten.OPS,
    **attention.OPS,
    **cast.OPS,
    **classic.OPS,
    **conv.OPS,
    **draws.OPS,
    **elementwise.OPS,
    **image.OPS,
    **index.OPS,
    **linear.OPS,
    **loss.OPS,
    **norm.OPS,
    **pool.OPS,
    **quant.OPS,
    **recurrent.OPS,
    **reduce.OPS,
    **resize.OPS,
    **sequence.OPS,
    **shape.OPS,
    **signal.OPS,
    **text.OPS,
}

HOST: dict[str, Function] = host.OPS

CONTROL: dict[str, Function] = control.OPS

__all__ = ["CONTROL", "HOST", "OPS", "Function"]
