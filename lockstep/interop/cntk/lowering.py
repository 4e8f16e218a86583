"""A CNTK model as a graph, for `lockstep.load_network`, `lockstep import` and policies."""

from __future__ import annotations

from pathlib import Path

from lockstep.interop.cntk.graph import load_cntk
from lockstep.interop.traced import trace
from lockstep.models.graph.graph import About, Dim
from lockstep.models.graph.module import GraphModule


def read_cntk(path: Path) -> GraphModule:
    """Read a `.model` or `.dnn`.

    Raises:
        FormatError: it is missing, damaged or not known; or the model reads sequences, which only `load_cntk` runs with their
            own lengths.
    """
    net = load_cntk(path)
    loops = [part for part in net.program.parts if part.direction]
    if loops or net.sequence_inputs:
        function = (loops or net.program.parts)[0].functions[0]
        raise function.fail(
            "reads sequences; a graph would fix the number of steps. Load it with interop.cntk.load_cntk"
        )
    shapes: dict[str, tuple[Dim, ...]] = {name: ("batch", *shape) for name, shape in net.input_shapes.items()}
    layout = "NCHW" if any(len(shape) == 4 for shape in shapes.values()) else ""
    about = About(format="cntk", layout=layout)  # type: ignore[arg-type]
    return trace(net, shapes, net.output_names, about=about, path=str(path))
