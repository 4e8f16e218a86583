"""A model folder as Hugging Face writes it, as a `TensorSource`: nothing is read before it is asked for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from lockstep.core.errors import FormatError, InputError, unknown_name
from lockstep.core.tensors import QuantisedTensor
from lockstep.interop.hf.hub import download, is_hub_id
from lockstep.interop.hf.json_file import read_object

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


class HFFolder:
    """`config.json`, weights in one file or in shards by index (safetensors, memory-mapped; `.bin` only if
    `torch.load(weights_only=True)` takes it) and tokenizer files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = read_object(folder / "config.json")
        if not isinstance(self._config.get("model_type"), str):
            raise FormatError("has no model_type", path=str(folder / "config.json"))
        _refuse_quantised(self._config, folder)
        self._shards, self._where = _open_shards(folder)

    @classmethod
    def open(
        cls, model: str | Path, *, revision: str | None = None, cache: Path | None = None, offline: bool = False
    ) -> HFFolder:
        """Open a folder, or a hub id through the hub's cache.

        Args:
            model: a folder that exists, else `organisation/name`.
            revision, cache, offline: of the hub, see `download`.

        Raises:
            InputError: neither a folder nor a reachable model.
            FormatError: the folder lacks a file, or one is damaged; the message names file and tensor.
        """
        folder = Path(model)
        if not folder.is_dir():
            if folder.exists():
                raise InputError(f"{model} is a file, expected a model folder", field="model")
            if not is_hub_id(str(model)):
                raise InputError(f"{model} does not exist (and is not a hub id such as org/name)", field="model")
            folder = download(str(model), revision=revision, cache=cache, offline=offline)
        return cls(folder)

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    def generation_config(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        return read_object(path) if path.exists() else {}

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shard(name).shape(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._shard(name).tensor(name)

    def quantised(self, name: str) -> QuantisedTensor | None:
        self._shard(name)
        return None

    def tokenizer(self) -> Path:
        return self.folder

    def _shard(self, name: str) -> _Shard:
        if name not in self._where:
            raise InputError(f"{self.folder}: {unknown_name('tensor', name, self._where)[:400]}", field=name)
        return self._shards[self._where[name]]


class _Shard(Protocol):
    """One file of weights."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> torch.Tensor: ...


class _SafeShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._names = list(self._file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"is not a readable safetensors file: {error}", path=str(path)) from error

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
            raise FormatError(f"tensor {name!r} cannot be read: {error}", path=str(self.path)) from error
        return tensor


class _PickledShard:
    def __init__(self, path: Path) -> None:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
            raise FormatError(
                f"is not a plain pickle of tensors ({str(error)[:200]}); convert it to safetensors where it is trusted",
                path=str(path),
            ) from error
        is_tensors = isinstance(loaded, dict) and all(isinstance(value, torch.Tensor) for value in loaded.values())
        if not is_tensors:
            raise FormatError("does not hold a dict of tensors", path=str(path))
        self._tensors: dict[str, torch.Tensor] = loaded

    def names(self) -> list[str]:
        return [str(name) for name in self._tensors]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _open_shard(path: Path) -> _Shard:
    return _SafeShard(path) if path.suffix == ".safetensors" else _PickledShard(path)


def _open_shards(folder: Path) -> tuple[dict[str, _Shard], dict[str, str]]:
    """Shards by file name, and each tensor's file name."""
    for single in (SAFETENSORS, PICKLED):
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            shard = _open_shard(folder / single)
            return {single: shard}, dict.fromkeys(shard.names(), single)
        if index.exists():
            return _open_index(folder, index)
    there = sorted(path.name for path in folder.iterdir())[:20]
    raise FormatError(f"has neither {SAFETENSORS} nor {SAFETENSORS}.index.json; it holds {there}", path=str(folder))


def _open_index(folder: Path, index: Path) -> tuple[dict[str, _Shard], dict[str, str]]:
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise FormatError("has no weight_map", path=str(index))
    ending = ".safetensors" if index.name.startswith(SAFETENSORS) else ".bin"
    for name, file in where.items():
        # A plain name: an index must not reach out of its folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(ending):
            raise FormatError(
                f"places tensor {name!r} in {file!r}, expected a {ending} file beside it", path=str(index)
            )
    files = list(dict.fromkeys(where.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FormatError(
            f"lists shards that are not there: {', '.join(missing[:5])}; fetch them again", path=str(index)
        )
    shards = {file: _open_shard(folder / file) for file in files}
    present = {file: set(shard.names()) for file, shard in shards.items()}
    for name, file in where.items():
        if name not in present[file]:
            raise FormatError(f"places tensor {name!r} in {file}, which does not have it", path=str(index))
    for file, names in present.items():
        stray = sorted(name for name in names if where.get(name) != file)
        if stray:
            raise FormatError(f"does not place tensor {stray[0]!r}, which {file} has", path=str(index))
    return shards, where


def _refuse_quantised(config: dict[str, Any], folder: Path) -> None:
    method = config.get("quantization_config")
    if method:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise FormatError(
            f"is quantised with {name!r}, which is not read; take the unquantised model or a GGUF file",
            path=str(folder),
        )
