"""Which block format each tensor of a file gets: the mixtures of llama-quantize, by their names there.

A mixture gives more bits where errors cost most: the output matrix, and of some layers the values of attention and the way
down of the MLP. Source: llama.cpp, `src/llama-quant.cpp`, which files are compared with by `tests/reference`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from lockstep.interop.gguf import rope_scaling
from lockstep.interop.gguf.formats import BY_NAME

MIXTURES: dict[str, str] = {
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "MXFP4_MOE": "MXFP4",
}
"""Names that are no formats of their own: the format that most of the matrices get."""

# One-dimensional tensors and these stay plain numbers in any file.
_KEPT_PLAIN = ("*.ffn_gate_inp.weight", "position_embd.weight", "*norm.weight", rope_scaling.TENSOR)

# What llama-quantize takes where a row is no whole number of blocks of 256.
_NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def is_plain(gguf_name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor stays float32 in a file of any format: vectors, norms, routers, positions."""
    return len(shape) == 1 or any(fnmatch(gguf_name, pattern) for pattern in _KEPT_PLAIN)


def fitting(kind: str, width: int) -> str:
    """The format itself where rows of `width` are whole blocks, else one of smaller blocks, else F16.

    >>> fitting("Q4_K", 512), fitting("Q4_K", 96), fitting("Q4_K", 100)
    ('Q4_K', 'Q5_0', 'F16')
    """
    if width % BY_NAME[kind].block_size:
        kind = _NARROW.get(kind, "F16")
    return kind if width % BY_NAME[kind].block_size == 0 else "F16"


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A named mixture for one model."""

    name: str
    num_layers: int
    num_experts: int
    heads_per_kv: int
    arch: str
    tied: bool
    """The file has no output matrix: the embedding is it."""

    @classmethod
    def of(cls, name: str, arch: str, config: Mapping[str, Any], *, tied: bool) -> Mixture:
        """For the model of a Hugging Face config."""
        heads = int(config.get("num_attention_heads") or 1)
        experts = (config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
        return cls(
            name=name,
            num_layers=int(config.get("num_hidden_layers") or config.get("n_layer") or 0),
            num_experts=int(next((num for num in experts if num), 0)),
            # The latent attention of DeepSeek counts as one head of keys.
            heads_per_kv=heads if arch == "deepseek2" else heads // int(config.get("num_key_value_heads") or heads),
            arch=arch,
            tied=tied,
        )

    def kind(self, gguf_name: str, shape: tuple[int, ...]) -> str:
        """Format of a matrix, before `fitting`."""
        main = MIXTURES.get(self.name, self.name)
        if gguf_name == "output.weight" or (self.tied and gguf_name == "token_embd.weight"):
            return "Q8_0" if main in ("Q8_0", "MXFP4") or shape[-1] % BY_NAME[main].block_size else "Q6_K"
        if main == "MXFP4":
            return "MXFP4" if len(shape) == 3 else "Q8_0"
        found = re.match(r"blk\.(\d+)\.(.*)\.weight$", gguf_name)
        if found is None:
            return main
        layer, what = int(found[1]), found[2]
        if what in ("attn_v", "attn_qkv", "attn_kv_b"):
            return self._values(main, layer)
        if what == "attn_k" and self.num_experts == 8:
            return "Q8_0"
        if what.startswith("ffn_down"):
            return self._down(main, layer)
        if what == "attn_output" and self.num_experts == 8 and main in ("Q4_K", "IQ4_NL"):
            return "Q5_K"
        return main

    def _values(self, main: str, layer: int) -> str:
        if self.num_experts == 8:
            return "Q8_0"
        kind = main
        if main == "IQ4_NL" and self.heads_per_kv >= 4:
            kind = "Q5_K"
        elif self.name in ("Q4_K_M", "Q5_K_M") and self._counts_more(layer):
            kind = "Q6_K"
        elif self.name == "Q4_K_S" and layer < 4:
            kind = "Q5_K"
        is_70b = self.arch in ("llama", "qwen2") and self.num_layers == 80 and self.heads_per_kv > 1
        return "Q5_K" if is_70b and kind == "Q4_K" else kind

    def _down(self, main: str, layer: int) -> str:
        if self.name in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if self._counts_more(layer) else main
        is_first = layer < self.num_layers // 8
        return "Q5_K" if is_first and (self.name == "Q4_K_S" or main == "IQ4_NL") else main

    def _counts_more(self, layer: int) -> bool:
        """The first and the last eighth, and every third layer between."""
        eighth = self.num_layers // 8
        return layer < eighth or layer >= 7 * self.num_layers // 8 or (layer - eighth) % 3 == 2
