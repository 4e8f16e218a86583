"""Tensors by name from `.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt`: no code of the file is run."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lockstep.core.errors import FormatError
from lockstep.interop.archives import Archive
from lockstep.interop.pickles import load_pickle

HINT = "save the weights alone, with torch.save(model.state_dict(), path)"
WRAPPERS = ("model_weights", "state_dict", "model_state_dict", "model", "agent", "policy", "net", "module")
"""Keys under which checkpoints keep the state dict beside other things."""

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_state(path: Path | str) -> dict[str, torch.Tensor]:
    """Every tensor of a file by its dotted name; those of the second object of a tuple begin with "1.".

    Raises:
        FormatError: damaged, not a file of weights, or one whose pickle names classes beside tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
            raise FormatError(f"is not a readable safetensors file: {error}", path=str(path)) from error
    return tensors_of(read_object(path), path)


def read_object(path: Path) -> Any:
    """What torch.save wrote: containers, numbers and tensors.

    Raises:
        FormatError: as `read_state`.
    """
    archive = Archive(path, "a zip archive of torch.save (files of PyTorch before 1.6 must be saved again)")
    roots = [name for name in archive.names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        kind = "a TorchScript program; save its state_dict" if any("/code/" in n for n in archive.names) else "unknown"
        raise FormatError(f"holds no data.pkl of torch.save: {kind}", path=str(path))
    return unpickle(archive, roots[0].removesuffix("data.pkl"))


def unpickle(archive: Archive, root: str) -> Any:
    """The object of `torch.save` under a folder of an archive."""
    storages: dict[str, torch.Tensor] = {}
    little = archive.read(f"{root}byteorder") != b"big" if f"{root}byteorder" in archive else True

    def persistent(pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Storage):
            raise FormatError("its pickle refers to something that is no tensor")
        key, dtype = str(pid[2]), pid[1].dtype
        if key not in storages:
            raw = archive.read(f"{root}data/{key}")
            if len(raw) % dtype.itemsize or not little:
                raise FormatError(f"the bytes of tensor data {key} are no little-endian numbers of {dtype}")
            storages[key] = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.zeros(0, dtype=dtype)
        return _Storage(dtype, storages[key].view(dtype))

    functions: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor_v2": _rebuild,
        "torch._utils._rebuild_tensor": _rebuild,
        "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
        "torch.Size": lambda dims=(): tuple(dims),
        "torch.device": lambda *words: "cpu",
        "collections.OrderedDict": collections.OrderedDict,
        "collections.defaultdict": lambda *rest: {},
        "argparse.Namespace": _Settings,
    }
    # A class stands in the stream as itself; ours are made here and never called by name.
    kinds = {f"torch.{name}": _Storage(dtype) for name, dtype in STORAGES.items()}
    kinds |= {f"torch.storage.{name}": _Storage(dtype) for name, dtype in STORAGES.items()}
    return load_pickle(
        archive.read(f"{root}data.pkl"),
        str(archive.path),
        functions={**functions, **kinds},  # type: ignore[dict-item]
        persistent=persistent,
        hint=HINT,
    )


class _Settings:
    """Command-line arguments kept beside weights; nothing reads them."""

    def __setstate__(self, state: Any) -> None:
        return None


class _Storage:
    """A stretch of numbers, or (without them) their type."""

    def __init__(self, dtype: torch.dtype, numbers: torch.Tensor | None = None) -> None:
        self.dtype, self.numbers = dtype, numbers


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    numbers = storage.numbers if isinstance(storage, _Storage) else None
    whole = [offset, *size, *stride]
    if numbers is None or len(size) != len(stride) or any(not isinstance(n, int) or n < 0 for n in whole):
        raise FormatError("a tensor without numbers, or with a negative size or stride")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and (last >= numbers.numel() or math.prod(size) > numbers.numel()):
        raise FormatError(f"a tensor of shape {list(size)} reaches beyond its {numbers.numel()} numbers")
    if not math.prod(size):
        return torch.zeros(tuple(size), dtype=numbers.dtype)
    return torch.as_strided(numbers, tuple(size), tuple(stride), offset).clone()


def tensors_of(value: Any, path: Path) -> dict[str, torch.Tensor]:
    """Tensors of nested containers by dotted name; a wrapper such as {"state_dict": ...} is taken off.

    Raises:
        FormatError: there are none.
    """
    while isinstance(value, Mapping) and not any(isinstance(item, torch.Tensor) for item in value.values()):
        inner = next((value[key] for key in WRAPPERS if isinstance(value.get(key), Mapping)), None)
        if inner is None:
            break
        value = inner
    found: dict[str, torch.Tensor] = {}
    _collect(value, "", found, {})
    if not found:
        raise FormatError(f"holds no tensors; {HINT}", path=str(path))
    return {re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor for name, tensor in found.items()}


def _collect(value: Any, prefix: str, found: dict[str, torch.Tensor], seen: dict[int, Any]) -> None:
    """Depth first; a container that a file shares is walked once, so that nesting costs no more than the file's size."""
    if isinstance(value, torch.Tensor):
        found[prefix.removesuffix(".")] = value
    elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
        seen[id(value)] = value
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            _collect(item, f"{prefix}{key}.", found, seen)
