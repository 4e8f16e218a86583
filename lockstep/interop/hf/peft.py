"""Low-rank adapters as Hugging Face PEFT keeps them: a folder of `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lockstep.core.errors import ConfigError, FormatError, InputError, unknown_name
from lockstep.interop.files import put_back
from lockstep.interop.hf.json_file import read_object
from lockstep.layers.low_rank import Adapter, LowRank, name_matrices
from lockstep.models.adapter import adapter_slots
from lockstep.models.language import LanguageModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# What changes the computation in a way that is not ours: field -> values that are harmless.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, {}, []),
    "target_parameters": (None, []),
    "megatron_config": (None,),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
}


def load_adapter(model: LanguageModel, folder: str | Path) -> Adapter:
    """The adapter in a PEFT folder, for `model`.

    Raises:
        InputError: there is no such folder.
        FormatError: a file is missing or damaged, a tensor is for another model, or the adapter is of a kind that is not
            read (DoRA, trained biases or whole modules); the message names what.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with {CONFIG} and {WEIGHTS}", field="adapter")
    config = read_object(folder / CONFIG)
    _check(config, folder / CONFIG)
    tensors = _read(folder / WEIGHTS)
    slots = {slot.name: slot for slot in adapter_slots(model)}
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _TENSOR.fullmatch(key)
        if found is None:
            raise FormatError(f"holds {key!r}, which is no A or B of a low-rank pair", path=str(folder / WEIGHTS))
        name = found["name"]
        if name not in slots:
            raise FormatError(unknown_name("matrix", name, slots)[:400], path=str(folder / WEIGHTS))
        sides.setdefault(name, {})[found["side"]] = tensor
    stable = bool(config.get("use_rslora"))
    pairs = []
    for name, slot in slots.items():
        if name not in sides:
            continue
        if set(sides[name]) != {"A", "B"}:
            raise FormatError(f"has only lora_{next(iter(sides[name]))} of {name}", path=str(folder / WEIGHTS))
        rank = sides[name]["A"].shape[0]
        alpha = _of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        pairs.append(LowRank(slot, rank, float(alpha), rank_stabilised=stable))
    if not pairs:
        raise FormatError("holds no low-rank pair", path=str(folder / WEIGHTS))
    name_matrices(model)
    adapter = Adapter(pairs, rank_stabilised=stable)
    try:
        adapter.fill({f"{n}.lora_{s}.weight": t for n, both in sides.items() for s, t in both.items()})
    except InputError as error:
        raise FormatError(f"{error}; is it an adapter of another model?", path=str(folder / WEIGHTS)) from error
    return adapter


def save_adapter(adapter: Adapter, folder: str | Path, *, base: str = "", dtype: torch.dtype | None = None) -> None:
    """Writes the folder; it appears under its name only when it is complete, in place of an earlier one.

    Args:
        base: name of the base model, for those who look the adapter up.
        dtype: of the tensors; None: float32.

    Raises:
        ConfigError: the folder cannot be written, or is something else than an adapter's.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and holds no adapter; give another path")
    tensors = {_PREFIX + name: t.to(dtype or t.dtype).contiguous() for name, t in adapter.tensors().items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
            new, old = Path(made) / "new", Path(made) / "old"
            new.mkdir()
            (new / CONFIG).write_text(json.dumps(_config(adapter, base), indent=2, sort_keys=True) + "\n", "utf-8")
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            finally:
                put_back(old, folder)
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # a disk that is full is told by the latter
        raise ConfigError(f"cannot write {folder}: {error}") from error


def _config(adapter: Adapter, base: str) -> dict[str, Any]:
    pairs: list[LowRank] = list(adapter)
    rank = Counter(pair.rank for pair in pairs).most_common(1)[0][0]
    alpha = Counter(pair.alpha for pair in pairs).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "use_rslora": adapter.rank_stabilised,
        "bias": "none",
        # Whole names, so that nothing else is meant.
        "target_modules": [pair.slot.name for pair in pairs],
        "rank_pattern": {pair.slot.name: pair.rank for pair in pairs if pair.rank != rank},
        "alpha_pattern": {pair.slot.name: _plain(pair.alpha) for pair in pairs if pair.alpha != alpha},
    }


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _check(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise FormatError(f"has peft_type={config.get('peft_type')!r}; expected 'LORA'", path=str(path))
    for field, harmless in _REFUSED.items():
        if config.get(field) not in harmless:
            raise FormatError(
                f"has {field}={config[field]!r}, which is not read; expected {harmless[0]}", path=str(path)
            )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", key) for key in patterns):
        # PEFT takes them as regular expressions; those of a stranger's file are not run.
        raise FormatError("has an alpha_pattern that is not a plain name; write module names", path=str(path))
    numbers = [config.get("lora_alpha", 8), *patterns.values()]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        raise FormatError(f"has lora_alpha={config.get('lora_alpha')!r}; expected a number", path=str(path))


def _of_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the module's name or ends it after a dot."""
    for key, value in (patterns or {}).items():
        if name == key or name.endswith(f".{key}"):
            return value
    return default


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        pickled = path.with_suffix(".bin")
        more = f"; {pickled.name} is a pickle: save it as safetensors" if pickled.exists() else ""
        raise FormatError(f"is missing{more}", path=str(path))
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"is not a readable safetensors file: {error}", path=str(path)) from error
