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
from lockstep.interop.gguf.mixtures import MIXTURES, Mixture, fitting, is_plain
from lockstep.interop.gguf.naming import How, Match, interleave, is_buffer, match_hf
from lockstep.interop.gguf.vocabulary import sampling_fields, vocabulary_fields
from lockstep.interop.gguf.writer import TensorData, write_gguf

# Readers expect these types, which a plain list of numbers does not tell.
_TOKEN_ARRAYS = {
    "tokenizer.ggml.token_type": np.int32,
    "tokenizer.ggml.scores": np.float32,
    "tokenizer.ggml.precompiled_charsmap": np.uint8,
}

_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_gguf(
    path: str | Path,
    source: TensorSource,
    kind: str | None = None,
    *,
    pure: bool = True,
    overrides: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    name: str = "model",
    about: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Write a model as GGUF.

    Args:
        path: ends in `.gguf`.
        source: the model; its config says the family.
        kind: format of the matrices, one of `QUANTISERS` or `MIXTURES`; None keeps each as it is stored, blocks included.
            Vectors, norms, routers and position tables become F32; matrices whose rows are no whole blocks get a format of
            smaller blocks (`fitting`). Blocks of the source that are of the wanted format are kept.
        pure: all matrices in that format; False: as llama-quantize mixes formats under this name.
        overrides: format by GGUF name pattern, such as {"output.weight": "Q6_K"}; the first that matches wins.
        tokenizer: `tokenizer.*` fields; by default the source's own (`vocabulary_fields` of its folder), or a file without
            vocabulary where it has none.
        name: `general.name`.
        about: more `general.*` fields, such as author and licence.

    Returns:
        the format of every tensor written, by GGUF name.

    Raises:
        InputError: an unknown format or family, or a tensor the family does not have.
        ConfigError: a tokenizer that GGUF has no words for; the path cannot be written.
    """
    for wanted in (*([kind] if kind else []), *(overrides or {}).values()):
        if wanted not in QUANTISERS and not (wanted == kind and wanted in MIXTURES):
            raise InputError(unknown_name("format to write", wanted, [*QUANTISERS, *MIXTURES]), field="kind")
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
    tied = all(match.rule.gguf != "output" for members in groups.values() for _, match in members)
    main = MIXTURES.get(kind, kind) if kind else None
    is_mixed = kind is not None and not pure and BY_NAME[main or ""].block_size > 1
    mixture = Mixture.of(kind or "", family.arch, config, tied=tied) if is_mixed else None
    plan = _Plan(source, config, main, mixture, overrides or {})
    tensors: dict[str, TensorData] = plan.rope_freqs()
    for gguf_name, members in groups.items():
        tensors |= plan.group(gguf_name, members)
    stored = {gguf_name: tensor.kind for gguf_name, tensor in tensors.items()}
    words = _tokenizer_fields(source, config, tokenizer) | sampling_fields(source.generation_config())
    write_gguf(path, {**(about or {}), **_metadata(fields, stored, kind, name, words)}, tensors)
    return stored


def _metadata(
    fields: dict[str, Any], stored: dict[str, str], kind: str | None, name: str, tokenizer: dict[str, Any]
) -> dict[str, Any]:
    main = kind or stored.get("blk.0.ffn_down.weight") or stored["token_embd.weight"]
    general: dict[str, Any] = {"general.type": "model", "general.name": name, "general.quantization_version": 2}
    if main in FILE_TYPES:
        general["general.file_type"] = FILE_TYPES[main]
    return {**fields, **general, **tokenizer}


def _tokenizer_fields(source: TensorSource, config: dict[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    whole = dict(given) if given is not None else _own_fields(source, config)
    fields: dict[str, Any] = {key: value for key, value in whole.items() if key.startswith("tokenizer.")}
    for key, dtype in _TOKEN_ARRAYS.items():
        if key in fields:
            fields[key] = np.asarray(fields[key], dtype)
    if not fields:
        fields = {"tokenizer.ggml.model": "none"}
    for key, hf_key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        token = config.get(hf_key)
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int):
            fields.setdefault(f"tokenizer.ggml.{key}_token_id", token)
    return fields


def _own_fields(source: TensorSource, config: dict[str, Any]) -> dict[str, Any]:
    own = source.tokenizer()
    if isinstance(own, dict):
        return own
    return vocabulary_fields(own, config["vocab_size"]).fields if (own / "tokenizer.json").is_file() else {}


@dataclass(frozen=True)
class _Plan:
    source: TensorSource
    config: dict[str, Any]
    kind: str | None
    mixture: Mixture | None
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
        wanted = self._wanted(gguf_name, shape)
        kept = self._kept_blocks(wanted, names, match)
        if kept is not None:
            return {gguf_name: TensorData(kept[0], shape, kept[1])}
        kind = self._stored(hf_name) if wanted is None else wanted
        return {gguf_name: TensorData(kind, shape, lambda: _encode(kind, self._values(names, match), shape))}

    def _kept_blocks(
        self, wanted: str | None, names: list[str], match: Match
    ) -> tuple[str, Callable[[], NDArray]] | None:
        first = None if match.rule.how is How.PLUS_ONE else self.source.quantised(names[0])
        if first is None or wanted not in (None, first.kind):
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
            kind = self._wanted(name, shape) or self._stored(hf_name)
            tensors[name] = TensorData(kind, shape, _encoder(kind, part, which, shape))
        return tensors

    def _override(self, gguf_name: str) -> str | None:
        return next((kind for pattern, kind in self.overrides.items() if fnmatch(gguf_name, pattern)), None)

    def _wanted(self, gguf_name: str, shape: tuple[int, ...]) -> str | None:
        """The format asked for; None: as it is stored."""
        wanted = self._override(gguf_name)
        if wanted is None and is_plain(gguf_name, shape):
            return "F32"
        if wanted is None and self.mixture is not None:
            wanted = self.mixture.kind(gguf_name, shape)
        wanted = wanted or self.kind
        return None if wanted is None else fitting(wanted, shape[-1])

    def _stored(self, hf_name: str) -> str:
        return _STORED.get(self.source.tensor(hf_name).dtype, "F32")


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
