"""A GGUF file as a `TensorSource`: tensors by Hugging Face name, in Hugging Face's layout.

What the format changed is undone on the way out: interleaved q and k rows, stacked experts, Gemma's norm factors, GPT-2's
transposed projections, DeepSeek's split up-projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lockstep.core.errors import FormatError, InputError, unknown_name
from lockstep.core.tensors import QuantPlanes
from lockstep.interop.gguf.blocks import READABLE, dequantise
from lockstep.interop.gguf.configs import config_of, family_of_file, generation_config_of
from lockstep.interop.gguf.container import GGUFFile, TensorInfo
from lockstep.interop.gguf.naming import How, Match, deinterleave, match_gguf
from lockstep.interop.gguf.rope_scaling import TENSOR as ROPE_FREQS
from lockstep.interop.gguf.unpack import LAYOUTS, unpack

_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True, eq=False)
class GGUFBlocks:
    """A quantised matrix as blocks; a `QuantisedTensor`."""

    kind: str
    shape: tuple[int, int]
    data: NDArray[np.uint8]
    """[N, bytes of a row]."""

    def planes(self, start: int = 0, stop: int | None = None) -> QuantPlanes:
        rows = self.data[start:stop]
        return unpack(self.kind, rows, (len(rows), self.shape[1]))

    def dequantise(self) -> NDArray[np.float32]:
        return dequantise(self.kind, self.data, self.shape)


@dataclass(frozen=True)
class _Part:
    """Where a Hugging Face tensor lies: usually one table row, two for a split projection."""

    rows: tuple[TensorInfo, ...]
    match: Match
    expert: int | None


class GGUFSource:
    """A model in a GGUF file.

    `transposed(name)` tells the projections that Hugging Face stores as [in, out]: `quantised` gives their blocks with
    rows = outputs all the same.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.family = family_of_file(file)
        self._config = config_of(file, self.family)
        self._parts = self._index()

    @classmethod
    def open(cls, path: str | Path) -> GGUFSource:
        """Open a model.

        Raises:
            FormatError: not GGUF, damaged, an unknown architecture, or tensors that the architecture does not have.
        """
        return cls(GGUFFile.open(path))

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    def generation_config(self) -> dict[str, Any]:
        return generation_config_of(self.file)

    def names(self) -> list[str]:
        return list(self._parts)

    def tokenizer(self) -> dict[str, Any]:
        """Plain values of every `tokenizer.*` key: lists of str, numpy arrays, numbers."""
        return {key: field.value for key, field in self.file.metadata.items() if key.startswith("tokenizer.")}

    def transposed(self, name: str) -> bool:
        part = self._part(name)
        return part.match.rule.how is How.TRANSPOSED and len(part.rows[0].shape) == 2

    def shape(self, name: str) -> tuple[int, ...]:
        part = self._part(name)
        shape = part.rows[0].shape
        if part.match.rule.how is How.KV_B and len(part.rows) == 2:
            heads, rank, nope = shape
            return heads * (nope + part.rows[1].shape[1]), rank
        if part.expert is not None:
            return shape[1:]
        return tuple(reversed(shape)) if self.transposed(name) else shape

    def tensor(self, name: str) -> torch.Tensor:
        part = self._part(name)
        how = part.match.rule.how
        if how is How.KV_B:
            return self._joined(part)
        tensor = self._plain(part.rows[0])
        if part.expert is not None:
            return tensor[part.expert]
        if how is How.PLUS_ONE:
            return tensor - 1
        if self.transposed(name):
            return tensor.t()
        order = self._order(part)
        return tensor if order is None else tensor[order]

    def quantised(self, name: str) -> GGUFBlocks | None:
        part = self._part(name)
        info = part.rows[0]
        if info.type.name not in LAYOUTS or part.match.rule.how is How.KV_B:
            return None
        data = self.file.tensor_bytes(info.name)
        if part.expert is not None:
            size = info.num_bytes // info.shape[0]
            data = data[part.expert * size : (part.expert + 1) * size]
        shape = (info.shape[-2] if len(info.shape) > 1 else 1, info.shape[-1])
        data = data.reshape(shape[0], info.row_bytes)
        order = self._order(part)
        return GGUFBlocks(info.type.name, shape, data if order is None else data[order.numpy()])

    def _index(self) -> dict[str, _Part]:
        parts: dict[str, _Part] = {}
        num_blocks = self._config["n_layer" if self.family.arch == "gpt2" else "num_hidden_layers"]
        for info in self.file.tensors.values():
            if info.name == ROPE_FREQS:
                continue
            match = match_gguf(self.family, info.name)
            if match is None or (match.block is not None and match.block >= num_blocks):
                raise FormatError(
                    f"tensor {info.name!r} is not part of a {self.family.arch} model of {num_blocks} blocks as known here",
                    path=self.file.path,
                )
            self._check_shape(match, info)
            self._add(parts, match, info)
        for name, part in parts.items():
            if part.match.rule.how is How.KV_B:
                self._check_split(name, part)
        return parts

    def _add(self, parts: dict[str, _Part], match: Match, info: TensorInfo) -> None:
        if match.rule.how is How.EXPERTS:
            for expert in range(info.shape[0]):
                parts[match.hf(expert)] = _Part((info,), match, expert)
            return
        name = match.hf()
        before = parts.get(name)
        # Keys before values, whatever the file's order.
        rows = (info,) if before is None else tuple(sorted((*before.rows, info), key=lambda row: row.name))
        if len(rows) > (2 if match.rule.how is How.KV_B else 1):
            raise FormatError(f"{name!r} is stored twice, as {[row.name for row in rows]}", path=self.file.path)
        parts[name] = _Part(rows, match, None)

    def _check_shape(self, match: Match, info: TensorInfo) -> None:
        rank = {How.EXPERTS: 3, How.KV_B: 3}.get(match.rule.how, 1 if match.suffix == ".bias" else len(info.shape))
        experts = next((self._config[key] for key in _EXPERT_KEYS if key in self._config), 0)
        heads = self._heads(match)
        wrong = (
            len(info.shape) != rank
            or (match.rule.how is How.EXPERTS and info.shape[0] != experts)
            or (heads is not None and info.shape[0] % (2 * heads) != 0)
        )
        if wrong:
            raise FormatError(
                f"tensor {info.name!r} has shape {list(info.shape)}, which does not fit", path=self.file.path
            )

    def _check_split(self, name: str, part: _Part) -> None:
        heads = self._config["num_attention_heads"]
        rank = self._config.get("kv_lora_rank")
        fits = len(part.rows) == 2 and part.rows[0].shape[:2] == (heads, rank)
        if not fits or part.rows[1].shape[0] != heads or part.rows[1].shape[2] != rank:
            shapes = [(row.name, list(row.shape)) for row in part.rows]
            raise FormatError(f"{name!r} cannot be put together from {shapes}", path=self.file.path)

    def _part(self, name: str) -> _Part:
        if name not in self._parts:
            message = f"{self.file.path}: {unknown_name('tensor', name, self._parts)[:400]}"
            raise InputError(message, field=name)
        return self._parts[name]

    def _heads(self, match: Match) -> int | None:
        key = {How.ROPE_Q: "num_attention_heads", How.ROPE_K: "num_key_value_heads"}.get(match.rule.how)
        if key is None:
            return None
        heads: int = self._config.get(key, self._config["num_attention_heads"])
        return heads

    def _order(self, part: _Part) -> torch.Tensor | None:
        heads = self._heads(part.match)
        return None if heads is None else deinterleave(part.rows[0].shape[0], heads)

    def _plain(self, info: TensorInfo) -> torch.Tensor:
        """The table row as a tensor, still in GGUF's layout."""
        data = self.file.tensor_bytes(info.name)
        dtype = _TORCH.get(info.type.name)
        if dtype is None:
            if info.type.name not in READABLE:
                message = (
                    f"tensor {info.name!r} is {info.type.name}, which is not read here; known: {', '.join(READABLE)}"
                )
                raise FormatError(message, path=self.file.path)
            return torch.from_numpy(dequantise(info.type.name, data, info.shape))
        if info.start % dtype.itemsize or not data.flags.writeable:
            data = data.copy()
        return torch.from_numpy(data).view(dtype).reshape(info.shape)

    def _joined(self, part: _Part) -> torch.Tensor:
        keys, values = (self._plain(info) for info in part.rows)
        return torch.cat([keys.transpose(1, 2), values.to(keys.dtype)], dim=1).reshape(self.shape(part.match.hf()))


_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
