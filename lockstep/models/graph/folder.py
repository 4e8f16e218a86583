"""Folders of imported networks: `config.json` (the graph), `model.safetensors` (the weights), `original/` (the framework's
own files, where a reader kept them)."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lockstep.core.errors import CheckpointError, FormatError
from lockstep.models.graph.graph import Graph
from lockstep.models.graph.module import GraphModule

FORMAT = "lockstep-network-1"
ORIGINAL = "original"


def save_graph(module: GraphModule, folder: Path | str) -> None:
    """Write a folder; files are replaced one by one, the weights last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_original(module, folder)
    document = {"format": FORMAT, "graph": module.graph.to_json()}
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(document) + "\n")
    temporary.replace(folder / "config.json")
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")


def save_original(module: GraphModule, folder: Path) -> None:
    """Write the framework's own files into `folder/original`, which holds no others afterwards."""
    for name, content in module.original.items():
        (folder / ORIGINAL).mkdir(exist_ok=True)
        (folder / ORIGINAL / name).write_bytes(content)
    for name in load_original(folder):
        if name not in module.original:
            (folder / ORIGINAL / name).unlink()


def load_original(folder: Path) -> dict[str, bytes]:
    """What `save_original` wrote."""
    files = sorted((folder / ORIGINAL).glob("*")) if (folder / ORIGINAL).is_dir() else []
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def is_graph_folder(folder: Path) -> bool:
    """Whether `save_graph` wrote a folder."""
    try:
        document = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT


def load_graph(folder: Path | str) -> GraphModule:
    """Read a folder that `save_graph` wrote.

    Raises:
        CheckpointError: missing, damaged, or of another kind.
    """
    folder = Path(folder)
    if not is_graph_folder(folder):
        raise CheckpointError(
            f"{folder} is no folder of an imported network; write one with: lockstep import FILE --out DIR"
        )
    try:
        document = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        return GraphModule(Graph.from_json(document["graph"]), tensors, original=load_original(folder))
    except (OSError, ValueError, KeyError, FormatError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
