"""A CNTK model as a graph, for `lockstep.load_network`, `lockstep import` and policies."""

from __future__ import annotations

from pathlib import Path

from lockstep.interop.cntk.graph import load_cntk
from lockstep.interop.traced import trace
from lockstep.models.graph.graph import About, Dim
from lockstep.models.graph.module import GraphModule


def read_cntk(path: Path) -> GraphModule:
    """Read a `.model` or `.dnn`. In a graph the sequences of a batch are of one length; `load_cntk` also takes ragged ones.

    Raises:
        FormatError: it is missing, damaged or not known.
    """
    net = load_cntk(path)
    shapes: dict[str, tuple[Dim, ...]] = {
        name: ("batch", "steps", *shape) if name in net.sequence_inputs else ("batch", *shape)
        for name, shape in net.input_shapes.items()
    }
    layout = "NCHW" if any(len(shape) == 4 for shape in shapes.values()) else ""
    about = About(format="cntk", layout=layout)  # type: ignore[arg-type]
    return trace(net, shapes, net.output_names, about=about, path=str(path))
