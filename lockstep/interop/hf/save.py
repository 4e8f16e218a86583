"""Model folders as `transformers` reads them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lockstep.core.errors import ConfigError, InputError
from lockstep.interop.hf.folder import SAFETENSORS

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
MORE_TEMPLATES = "additional_chat_templates"


def save_folder(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = 5 * 10**9,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer_from: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder; it appears under its name only when it is complete.

    Args:
        path: the folder; must not exist or be empty, unless `overwrite`.
        config: content of `config.json`.
        tensors: by Hugging Face name. An iterable is consumed one shard at a time.
        max_shard_bytes: a shard is closed before it would exceed this; a larger tensor has a shard of its own.
        generation_config: content of `generation_config.json`, if any.
        tokenizer_from: folder whose tokenizer files are copied.
        overwrite: replace a folder that is there.

    Raises:
        InputError: a name twice, or nothing to write.
        ConfigError: the folder is there, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is there already; give another path or overwrite=True")
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            _write_json(temporary / "config.json", config)
            if generation_config:
                _write_json(temporary / "generation_config.json", generation_config)
            if tokenizer_from is not None:
                for name in TOKENIZER_FILES:
                    if (tokenizer_from / name).is_file():
                        shutil.copyfile(tokenizer_from / name, temporary / name)
                if (tokenizer_from / MORE_TEMPLATES).is_dir():
                    shutil.copytree(tokenizer_from / MORE_TEMPLATES, temporary / MORE_TEMPLATES)
            _write_shards(temporary, items, max_shard_bytes)
            temporary.chmod(0o755)
            _swap(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2, sort_keys=True) + "\n", "utf-8")


def _write_shards(folder: Path, items: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> None:
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total_bytes = num_shards = 0
    placed: dict[str, int] = {}
    for name, tensor in items:
        if name in placed:
            raise InputError(f"tensor {name!r} is given twice", field=name)
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            _write_shard(folder, num_shards, shard)
            shard, shard_bytes, num_shards = {}, 0, num_shards + 1
        placed[name] = num_shards
        shard[name] = tensor
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if not shard:
        raise InputError("there are no tensors to write", field="tensors")
    _write_shard(folder, num_shards, shard)
    num_shards += 1
    if num_shards == 1:
        (folder / _part(0)).rename(folder / SAFETENSORS)
        return
    names = [f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors" for index in range(num_shards)]
    for index, name in enumerate(names):
        (folder / _part(index)).rename(folder / name)
    weight_map = {name: names[index] for name, index in sorted(placed.items())}
    _write_json(
        folder / f"{SAFETENSORS}.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    )


def _part(index: int) -> str:
    return f"part-{index}.safetensors"


def _write_shard(folder: Path, index: int, shard: Mapping[str, torch.Tensor]) -> None:
    seen: set[int] = set()
    own: dict[str, torch.Tensor] = {}
    for name, tensor in shard.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        # The format's writer refuses tensors that share memory, as tied or sliced ones do.
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        own[name] = tensor
    path = folder / _part(index)
    try:
        save_file(own, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a disk that is full is told so too
        raise OSError(str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _swap(temporary: Path, path: Path) -> None:
    """Put the new folder in the old one's place; between the two renames neither is there, but both are on disk."""
    if not path.exists():
        temporary.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / "folder"
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old.parent, ignore_errors=True)
