"""`lockstep import`: a network of another framework as a folder of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lockstep.core.errors import ConfigError
from lockstep.models.graph.graph import Graph
from lockstep.models.graph.module import GraphModule


@dataclass(frozen=True)
class ImportArgs:
    """Read a network of another framework and write it as a folder: config.json, model.safetensors and the original graph.

    The folder (or the file itself) then trains: lockstep train ppo-cartpole --network.imported FOLDER
    """

    file: Annotated[Path, tyro.conf.Positional]
    """File or folder of the other framework."""
    out: Path | None = None
    """Folder to write (default: only tell what the file holds)."""
    format: str = ""
    """Format, where content and suffix do not tell it."""
    options: tuple[str, ...] = ()
    """Options of the format's reader, NAME=VALUE: activation=tanh, normalize=vecnormalize.pkl, shapes=data=4,84,84, ..."""
    layout: Literal["", "NCHW", "NHWC"] = ""
    """Axes of image inputs, where the file does not tell them."""
    scale: float = 1.0
    """Factor on raw observations before they enter the network, such as 0.00392157 for images of 0 to 255."""
    mean: tuple[float, ...] = ()
    """Subtracted from raw observations before the factor: one number, or one for each channel."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ImportArgs, args=list(args), prog="lockstep import")
    from lockstep.interop.readers import format_of, load
    from lockstep.models.graph.folder import is_graph_folder, save_graph

    out = wish.out
    if out is not None and out.exists() and not (is_graph_folder(out) or (out.is_dir() and not any(out.iterdir()))):
        raise ConfigError(f"{out} holds something that no import wrote; give another --out")
    module = load(wish.file, format=wish.format, **_options(wish.options))
    about = module.graph.about
    about = replace(
        about,
        format=about.format or wish.format or format_of(wish.file),
        layout=wish.layout or about.layout,
        scale=wish.scale if wish.scale != 1.0 else about.scale,
        mean=wish.mean or about.mean,
    )
    module.graph = replace(module.graph, about=about)
    print("\n".join(describe(module)))
    if out is not None:
        save_graph(module, out)
        print(f"wrote        {out}")
        print(f"next         {_next(module.graph, out)}")
    return 0


def _next(graph: Graph, out: Path) -> str:
    shape = graph.inputs[0].shape if graph.inputs else None
    if shape is not None and shape[1:] in ((4,), (None,)):
        return f"lockstep train ppo-cartpole --network.imported {out}"
    wanted = ", ".join(str(dim or "?") for dim in shape[1:]) if shape else "?"
    return f"lockstep train RECIPE --network.imported {out}, with a recipe whose observations are [{wanted}]"


def _options(words: Sequence[str]) -> dict[str, str]:
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--options {word!r}: NAME=VALUE was expected")
        options[name] = value
    return options


def describe(module: GraphModule) -> list[str]:
    """What a user wants to know of an imported network, in lines."""
    graph = module.graph
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = trainable + sum(b.numel() for name, b in module.named_buffers() if name in module.state_dict())
    return [
        f"format       {graph.about.format}  {graph.about.producer}".rstrip(),
        *(f"input        {port}" for port in graph.inputs),
        *(f"output       {port}" for port in graph.outputs),
        f"operations   {operations(graph)}",
        f"parameters   {trainable:,} trainable of {total:,}",
        *(f"{key:<12} {value}" for key, value in _told(graph).items()),
    ]


def operations(graph: Graph) -> str:
    """Operations with their number, most frequent first.

    >>> operations(Graph(inputs=(), outputs=(), nodes=()))
    ''
    """
    return ", ".join(f"{n} {op}" for op, n in Counter(node.op for node in graph.walk()).most_common())


def _told(graph: Graph) -> dict[str, str]:
    facts = asdict(graph.about)
    words = {"layout": "layout", "scale": "scale", "mean": "mean", "states": "states"}
    plain = {"layout": "", "scale": 1.0, "mean": (), "states": {}}
    return {word: str(facts[key]) for key, word in words.items() if facts[key] != plain[key]}
