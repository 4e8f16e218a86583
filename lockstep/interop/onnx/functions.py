"""Functions that a model brings along, put in the place of their calls by onnx's own inliner."""

from __future__ import annotations

from typing import Any

from lockstep.core.errors import FormatError
from lockstep.core.extras import require


def inlined(model: Any, *, path: str) -> Any:
    """The model without local functions.

    Raises:
        FormatError: functions that call themselves, or that the inliner refuses.
    """
    if not model.functions:
        return model
    inliner = require("onnx.inliner", extra="onnx")
    _check_calls(model, path)
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:
        # The inliner is compiled code that raises several unrelated classes.
        raise FormatError(f"functions of the model cannot be inlined: {error}", path=path) from error


def _check_calls(model: Any, path: str) -> None:
    calls = {(f.domain, f.name): [(node.domain, node.op_type) for node in _nodes(f.node)] for f in model.functions}
    state: dict[tuple[str, str], int] = {}

    def visit(key: tuple[str, str], depth: int) -> None:
        if state.get(key) == 1 or depth > 200:
            raise FormatError(f"function {'.'.join(key)} calls itself", path=path)
        if key in state:
            return
        state[key] = 1
        for callee in calls[key]:
            if callee in calls:
                visit(callee, depth + 1)
        state[key] = 2

    for key in calls:
        visit(key, 0)


def _nodes(nodes: Any) -> Any:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                yield from _nodes(graph.node)
