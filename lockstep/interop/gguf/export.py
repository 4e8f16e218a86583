"""Any `TensorSource` to a GGUF file, quantised or as stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lockstep.core.errors import InputError, unknown_name
from lockstep.core.tensors import TensorSource
from lockstep.interop.gguf import rope_scaling
from lockstep.interop.gguf.blocks import QUANTISERS, quantise
from lockstep.interop.gguf.configs import fields_of, head_dim_of
from lockstep.interop.gguf.formats import BY_NAME, FILE_TYPES
from lockstep.interop.gguf.naming import How, Match, interleave, is_buffer, match_hf
from lockstep.interop.gguf.writer import TensorData, write_gguf

# One-dimensional tensors and these stay plain numbers in any file.
_KEPT_PLAIN = ("*.ffn_gate_inp.weight", "position_embd.weight", "*norm.weight", rope_scaling.TENSOR)

_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_gguf(
    path: str | Path,
    source: TensorSource,
    kind: str | None = None,
    *,
    overrides: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    name: str = "model",
) -> dict[str, str]:
    """Write a model as GGUF.

    Args:
        path: ends in `.gguf`.
        source: the model; its config says the family.
        kind: format of the matrices, one of `QUANTISERS`; None keeps each tensor as it is stored, blocks included.
            Vectors, routers and position tables become F32 if a kind is given; matrices whose rows are no whole blocks
            become F16.
        overrides: format by GGUF name pattern, such as {"output.weight": "Q6_K"}; the first that matches wins.
        tokenizer: `tokenizer.*` fields; by default the source's own if it has them, else a file without vocabulary.
        name: `general.name`.

    Returns:
        the format of every tensor written, by GGUF name.

    Raises:
        InputError: an unknown format or family, or a tensor the family does not have.
    """
    for wanted in (*([kind] if kind else []), *(overrides or {}).values()):
        if wanted not in QUANTISERS:
            raise InputError(unknown_name("format to write", wanted, QUANTISERS), field="kind")
    config = source.config()
    family, fields = fields_of(config)
    groups: dict[str, list[tuple[str, Match]]] = {}
    for hf_name in source.names():
        match = match_hf(family, hf_name)
        if match is None:
            if is_buffer(hf_name):
                continue
            raise InputError(f"tensor {hf_name!r} has no GGUF name in a {family.arch} model", field=hf_name)
        if match.rule.gguf == "output" and config.get("tie_word_embeddings"):
            continue
        groups.setdefault(match.gguf, []).append((hf_name, match))
    plan = _Plan(source, config, kind, overrides or {})
    tensors: dict[str, TensorData] = plan.rope_freqs()
    for gguf_name, members in groups.items():
        tensors |= plan.group(gguf_name, members)
    stored = {gguf_name: tensor.kind for gguf_name, tensor in tensors.items()}
    write_gguf(path, _metadata(fields, stored, kind, name, _tokenizer_fields(source, config, tokenizer)), tensors)
    return stored


def _metadata(
    fields: dict[str, Any], stored: dict[str, str], kind: str | None, name: str, tokenizer: dict[str, Any]
) -> dict[str, Any]:
    main = kind or stored.get("blk.0.ffn_down.weight") or stored["token_embd.weight"]
    general: dict[str, Any] = {"general.name": name, "general.quantization_version": 2}
    if main in FILE_TYPES:
        general["general.file_type"] = FILE_TYPES[main]
    return {**fields, **general, **tokenizer}


def _tokenizer_fields(source: TensorSource, config: dict[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    own = source.tokenizer()
    fields: dict[str, Any] = dict(given) if given is not None else (own if isinstance(own, dict) else {})
    if not fields:
        fields = {"tokenizer.ggml.model": "none"}
    for key, hf_key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        token = config.get(hf_key)
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int):
            fields.setdefault(f"tokenizer.ggml.{key}_token_id", token)
    return fields


@dataclass(frozen=True)
class _Plan:
    source: TensorSource
    config: dict[str, Any]
    kind: str | None
    overrides: Mapping[str, str]

    def rope_freqs(self) -> dict[str, TensorData]:
        if self.config["model_type"] == "gpt2":
            return {}
        rope = rope_scaling.parameters(self.config)
        if rope["rope_type"] != "llama3":
            return {}
        factors = rope_scaling.llama3_factors(rope, head_dim_of(self.config))
        return {rope_scaling.TENSOR: TensorData("F32", factors.shape, lambda: factors)}

    def group(self, gguf_name: str, members: list[tuple[str, Match]]) -> dict[str, TensorData]:
        """The table rows of the Hugging Face tensors that share a GGUF name."""
        hf_name, match = members[0]
        how = match.rule.how
        if how is How.KV_B:
            return self._split(hf_name, match)
        shape = self.source.shape(hf_name)
        if how is How.EXPERTS:
            members = sorted(members, key=lambda member: member[1].expert or 0)
            if [member[1].expert for member in members] != list(range(len(members))):
                raise InputError(f"{gguf_name}: experts are missing between the first and the last", field=hf_name)
            shape = (len(members), *shape)
        elif len(members) > 1:
            raise InputError(f"{[member[0] for member in members]} are one tensor, {gguf_name}, in GGUF", field=hf_name)
        elif how is How.TRANSPOSED:
            shape = tuple(reversed(shape))
        names = [member[0] for member in members]
        kept = self._kept_blocks(gguf_name, names, match)
        if kept is not None:
            return {gguf_name: TensorData(kept[0], shape, kept[1])}
        kind = self._kind(gguf_name, shape, hf_name)
        return {gguf_name: TensorData(kind, shape, lambda: _encode(kind, self._values(names, match), shape))}

    def _kept_blocks(self, gguf_name: str, names: list[str], match: Match) -> tuple[str, Callable[[], NDArray]] | None:
        if self.kind is not None or self._override(gguf_name) is not None or match.rule.how is How.PLUS_ONE:
            return None
        first = self.source.quantised(names[0])
        if first is None:
            return None
        order = self._order(match, first.shape[0])

        def make() -> NDArray:
            parts = []
            for name in names:
                blocks = self.source.quantised(name)
                if blocks is None or blocks.kind != first.kind:
                    raise InputError(f"{name!r} is not stored as {first.kind} as its siblings are", field=name)
                parts.append(blocks.data if order is None else blocks.data[order.numpy()])
            return np.concatenate(parts)

        return first.kind, make

    def _values(self, names: list[str], match: Match) -> torch.Tensor:
        """The tensor in GGUF's layout."""
        how = match.rule.how
        if how is How.EXPERTS:
            return torch.stack([self.source.tensor(name) for name in names])
        tensor = self.source.tensor(names[0])
        if how is How.PLUS_ONE:
            return tensor.float() + 1
        if how is How.TRANSPOSED:
            return tensor.t() if tensor.ndim == 2 else tensor
        order = self._order(match, tensor.shape[0])
        return tensor if order is None else tensor[order]

    def _order(self, match: Match, num_rows: int) -> torch.Tensor | None:
        key = {How.ROPE_Q: "num_attention_heads", How.ROPE_K: "num_key_value_heads"}.get(match.rule.how)
        if key is None:
            return None
        return interleave(num_rows, self.config.get(key) or self.config["num_attention_heads"])

    def _split(self, hf_name: str, match: Match) -> dict[str, TensorData]:
        heads, nope, wide = (self.config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
        rank = self.source.shape(hf_name)[1]

        def part(which: int) -> torch.Tensor:
            whole = self.source.tensor(hf_name).reshape(heads, nope + wide, rank)
            return whole[:, :nope].transpose(1, 2) if which == 0 else whole[:, nope:]

        stem = match.gguf.removesuffix(".attn_k_b.weight")
        tensors = {}
        for which, (letter, shape) in enumerate((("k", (heads, rank, nope)), ("v", (heads, wide, rank)))):
            name = f"{stem}.attn_{letter}_b.weight"
            kind = self._kind(name, shape, hf_name)
            tensors[name] = TensorData(kind, shape, _encoder(kind, part, which, shape))
        return tensors

    def _override(self, gguf_name: str) -> str | None:
        return next((kind for pattern, kind in self.overrides.items() if fnmatch(gguf_name, pattern)), None)

    def _kind(self, gguf_name: str, shape: tuple[int, ...], hf_name: str) -> str:
        wanted = self._override(gguf_name)
        if wanted is None and self.kind is None:
            return _STORED.get(self.source.tensor(hf_name).dtype, "F32")
        if wanted is None:
            plain = len(shape) == 1 or any(fnmatch(gguf_name, pattern) for pattern in _KEPT_PLAIN)
            wanted = "F32" if plain or self.kind is None else self.kind
        return wanted if shape[-1] % BY_NAME[wanted].block_size == 0 else "F16"


def _encoder(
    kind: str, part: Callable[[int], torch.Tensor], which: int, shape: tuple[int, ...]
) -> Callable[[], NDArray]:
    return lambda: _encode(kind, part(which), shape)


def _encode(kind: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> NDArray:
    if tuple(tensor.shape) != shape:
        raise InputError(f"a tensor has shape {list(tensor.shape)}, expected {list(shape)}")
    if _STORED.get(tensor.dtype) == kind:
        return tensor.contiguous().view(torch.uint8).numpy()
    return quantise(kind, tensor.float().contiguous().numpy())
