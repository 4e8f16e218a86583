"""A Caffe network as a graph, for `lockstep.load_network`, `lockstep import` and policies."""

from __future__ import annotations

from pathlib import Path

from lockstep.core.errors import FormatError
from lockstep.interop.caffe.graph import load_caffe
from lockstep.interop.traced import trace
from lockstep.models.graph.graph import About, Dim
from lockstep.models.graph.module import GraphModule


def read_caffe(path: Path, *, weights: str | Path = "", prototxt: str | Path = "") -> GraphModule:
    """Read a network with its weights.

    Args:
        path: the `.prototxt`, or the `.caffemodel` (`.h5`); the other file has the same stem in the same folder.
        weights, prototxt: the other file, where it is called otherwise.

    Raises:
        FormatError: a file is missing, damaged or not known.
    """
    path = Path(path)
    stem = path.name.removesuffix(".h5").removesuffix(".caffemodel").removesuffix(".prototxt")
    if path.suffix == ".prototxt":
        description = path
        found = [path.with_name(stem + ending) for ending in (".caffemodel", ".caffemodel.h5")]
        blobs = Path(weights) if weights else next((file for file in found if file.exists()), found[0])
    else:
        description, blobs = Path(prototxt) if prototxt else path.with_name(stem + ".prototxt"), path
    for file, option in ((description, "prototxt"), (blobs, "weights")):
        if not file.exists():
            raise FormatError(f"its companion {file} does not exist; give it with {option}=", path=str(path))
    net = load_caffe(description, blobs)
    recurrent = [step.spec for step in net.steps if step.spec.type in ("LSTM", "RNN")]
    markers = {spec.bottoms[1] for spec in recurrent} & set(net.input_names)
    shapes: dict[str, tuple[Dim, ...]] = {
        name: ("steps", "batch", *shape[2:]) if recurrent and len(shape) > 1 else ("batch", *shape[1:])
        for name, shape in net.input_shapes.items()
    }
    scales = {word: settings["scale"] for word, settings in net.preprocessing.items() if "scale" in settings}
    about = About(
        format="caffe",
        producer=net.spec.name,
        layout="NCHW" if any(len(shape) == 4 for shape in shapes.values()) else "",
        scale=float(next(iter(scales.values()))) if len(scales) == 1 else 1.0,
        mean=_mean(net.preprocessing),
        time_axis=0 if recurrent else None,
        marker=next(iter(markers)) if len(markers) == 1 else "",
        notes={
            f"{name}.{key}": value for name, settings in net.preprocessing.items() for key, value in settings.items()
        },
    )
    original = {"net.prototxt": description.read_bytes()}
    return trace(net, shapes, net.output_names, about=about, path=str(path), original=original)


def _mean(preprocessing: dict[str, dict[str, str]]) -> tuple[float, ...]:
    means = [settings["mean_value"] for settings in preprocessing.values() if "mean_value" in settings]
    return tuple(float(word) for word in means[0].split()) if len(means) == 1 else ()
