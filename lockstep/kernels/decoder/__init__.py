"""A stack of decoder layers in one call, for serving: the ops of each layer one after another without Python between them.

It makes the same calls as the layers do, so it has their bits; the layers are its definition (`lockstep.layers.decoder`) and
there is no naive twin here. What a step saves is some 10 microseconds an op, ten ops a layer.

Legend: T packed tokens, E model width.
"""

from __future__ import annotations

import ctypes
import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.activation.cpu import GATES
from lockstep.kernels.attention.cache import LayerCache
from lockstep.kernels.attention.cpu import KV_CODES, refused
from lockstep.kernels.low_rank import LowRankRun, check_runs
from lockstep.kernels.low_rank.cpu import run_array
from lockstep.kernels.packed_linear import PackedWeight

MAX_PACKS = 3
"""Packed matrices of one projection."""

_BAD_POSITION = 1 << 40
_P, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


@dataclass(frozen=True)
class LinearParts:
    """The packed matrices of one projection, at most three, and its bias."""

    packs: tuple[PackedWeight, ...]
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """What one layer computes with; norms that a family lacks are None."""

    attention_norm: Tensor
    attention_out_norm: Tensor | None
    mlp_norm: Tensor
    mlp_out_norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: LinearParts
    out: LinearParts
    gate_up: LinearParts
    down: LinearParts
    eps: float
    offset: float
    qk_eps: float
    qk_offset: float
    scale: float
    softcap: float
    window: int


class FinalNorm(NamedTuple):
    """The norm after the last layer, as `rms_norm` has it."""

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True, kw_only=True)
class StackSizes:
    """Sizes that all layers of a stack share."""

    width: int
    num_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    gate: str


class _Linear(ctypes.Structure):
    _fields_ = [
        ("spec", _P * MAX_PACKS),
        ("data", _P * MAX_PACKS),
        ("num_outputs", _I64 * MAX_PACKS),
        ("bias", _P),
        ("num_packs", _I64),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *[
            (name, _P)
            for name in ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm", "q_norm", "k_norm")
        ],
        *[(name, _Linear) for name in ("qkv", "out", "gate_up", "down")],
        *[(name, _F32) for name in ("eps", "offset", "qk_eps", "qk_offset", "scale", "softcap")],
        ("window", _I64),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [
        *[(name, _I64) for name in ("width", "num_heads", "kv_heads", "head_dim", "hidden", "num_pairs")],
        *[("gate", _I32), ("kv_dtype", _I32)],
    ]


class _Place(ctypes.Structure):
    _fields_ = [
        *[(name, _P) for name in ("k_pages", "v_pages", "k_scales", "v_scales", "cos", "sin")],
        ("table_rows", _I64),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, _P) for name in ("x", "residual", "out", "sum", "scratch")],
        *[(name, _P) for name in ("positions", "seq_starts", "context_lens", "pages")],
        *[(name, _I64) for name in ("pages_stride", "num_pages", "num_tokens", "num_seqs")],
        ("norm", _P),
        *[(name, _F32) for name in ("eps", "offset")],
        *[(name, _P) for name in ("runs", "run_starts")],
    ]


class DecoderStack:
    """The layers' weights as the compiled call reads them. Holds the tensors, so that their memory stays."""

    def __init__(self, sizes: StackSizes, layers: Sequence[LayerParts]) -> None:
        self.sizes = sizes
        self.layers = tuple(layers)
        self._array = (_Layer * len(self.layers))()
        for into, layer in zip(self._array, self.layers, strict=True):
            _write(into, layer)
        self._places: tuple[list[weakref.ref[LayerCache | Tensor]], Any] = ([], None)
        """What the last step's addresses were read from, without keeping the memory of a cache that sleeps, and they."""

    def run(
        self,
        x_TE: Tensor,
        norm: FinalNorm,
        batch: ForwardBatch,
        angles: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[LayerCache],
        runs: Sequence[Sequence[LowRankRun]] = (),
    ) -> Tensor:
        """The hidden state [T, E] before the first layer -> the norm of the one after the last.

        Args:
            angles: for each layer the tables cos and sin [P, R], contiguous.
            caches: for each layer.
            runs: what low-rank adapters add to q, k and v, to the output, to gate and up, and to down, of each layer in
                turn: four lists a layer. Empty: nothing.

        Raises:
            InputError: as `attention`, `rope` and `add_low_rank` do.
        """
        sizes, first = self.sizes, caches[0]
        self._check(x_TE, batch, caches)
        sizes_c = _Sizes(
            *(sizes.width, sizes.num_heads, sizes.kv_heads, sizes.head_dim, sizes.hidden, angles[0][0].shape[1]),
            *(GATES[sizes.gate], KV_CODES[first.dtype]),
        )
        x_TE, pages = native.contiguous(x_TE), native.contiguous(batch.pages_SP)
        num_tokens = x_TE.shape[0]
        library = native.lib()
        out, total = torch.empty_like(x_TE), torch.empty_like(x_TE)
        scratch = torch.empty(num_tokens * library.ls_decoder_scratch(ctypes.addressof(sizes_c)))
        step = _Step(
            *(x_TE.data_ptr(), None, out.data_ptr(), total.data_ptr(), scratch.data_ptr()),
            *(batch.positions_T.data_ptr(), batch.seq_starts.data_ptr(), batch.context_lens.data_ptr()),
            *(pages.data_ptr(), pages.shape[1], first.k.shape[0], num_tokens, batch.context_lens.shape[0]),
            *(norm.weight.data_ptr(), norm.eps, norm.offset, None, None),
        )
        if runs:
            self._check_runs(x_TE, runs)
            flat = run_array([run for of_matrix in runs for run in of_matrix])
            starts = (_I64 * (len(runs) + 1))(*accumulate(map(len, runs), initial=0))
            step.runs, step.run_starts = ctypes.addressof(flat), ctypes.addressof(starts)
        places = self._places_of(angles, caches)
        bad = library.ls_decoder(
            ctypes.addressof(sizes_c), self._array, places, len(self.layers), ctypes.addressof(step)
        )
        if bad >= _BAD_POSITION:
            token = bad - _BAD_POSITION
            raise InputError(f"token {token} has position {int(batch.positions_T[token])}", field="positions")
        if bad != -1:
            raise refused(batch, first, bad)
        return out

    def _places_of(self, angles: Sequence[tuple[Tensor, Tensor]], caches: Sequence[LayerCache]) -> Any:
        """Addresses of keys, values and angles; they are read again when a step brings other tensors than the last."""
        placed: list[LayerCache | Tensor] = [*caches, *(table for pair in angles for table in pair)]
        refs, places = self._places
        if len(refs) != len(placed) or any(map(operator.is_not, (ref() for ref in refs), placed)):
            places = (_Place * len(caches))(
                *[
                    _Place(
                        *(cache.k.data_ptr(), cache.v.data_ptr(), _address(cache.k_scale), _address(cache.v_scale)),
                        *(cos.data_ptr(), sin.data_ptr(), cos.shape[0]),
                    )
                    for cache, (cos, sin) in zip(caches, angles, strict=True)
                ]
            )
            self._places = [weakref.ref(one) for one in placed], places
        return places

    def _check_runs(self, x_TE: Tensor, runs: Sequence[Sequence[LowRankRun]]) -> None:
        sizes = self.sizes
        inputs = (sizes.width, sizes.num_heads * sizes.head_dim, sizes.width, sizes.hidden)
        if len(runs) != 4 * len(self.layers):
            raise InputError(
                f"{len(runs)} lists of runs for {len(self.layers)} layers; expected four each", field="runs"
            )
        for index, of_matrix in enumerate(runs):
            if of_matrix:
                layer = self.layers[index // 4]
                parts = (layer.qkv, layer.out, layer.gate_up, layer.down)[index % 4]
                num_outputs = sum(packed.num_outputs for packed in parts.packs)
                check_runs(of_matrix, x_TE.shape[0], inputs[index % 4], num_outputs, x_TE.device)

    def _check(self, x_TE: Tensor, batch: ForwardBatch, caches: Sequence[LayerCache]) -> None:
        sizes, first = self.sizes, caches[0]
        if len(caches) != len(self.layers) or (first.kv_heads, first.head_dim) != (sizes.kv_heads, sizes.head_dim):
            raise InputError(
                f"the cache has {len(caches)} layers of {(first.kv_heads, first.head_dim)} (kv heads, head dim); expected "
                f"{len(self.layers)} of {(sizes.kv_heads, sizes.head_dim)}",
                field="cache",
            )
        types = (batch.positions_T.dtype, batch.seq_starts.dtype, batch.context_lens.dtype, batch.pages_SP.dtype)
        if types != (torch.int64, torch.int32, torch.int32, torch.int32):
            raise InputError(
                f"positions, seq_starts, context_lens and pages are {types}; expected int64 and three int32",
                field="batch",
            )
        if x_TE.shape != (batch.positions_T.shape[0], sizes.width):
            raise InputError(
                f"x is {tuple(x_TE.shape)}; expected {(batch.positions_T.shape[0], sizes.width)}", field="x"
            )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _write(into: _Layer, layer: LayerParts) -> None:
    into.attention_norm, into.attention_out_norm = _address(layer.attention_norm), _address(layer.attention_out_norm)
    into.mlp_norm, into.mlp_out_norm = _address(layer.mlp_norm), _address(layer.mlp_out_norm)
    into.q_norm, into.k_norm = _address(layer.q_norm), _address(layer.k_norm)
    for place, parts in (
        (into.qkv, layer.qkv),
        (into.out, layer.out),
        (into.gate_up, layer.gate_up),
        (into.down, layer.down),
    ):
        for index, packed in enumerate(parts.packs):
            place.spec[index], place.data[index] = packed.spec.data_ptr(), packed.data.data_ptr()
            place.num_outputs[index] = packed.num_outputs
        place.bias, place.num_packs = _address(parts.bias), len(parts.packs)
    into.eps, into.offset, into.qk_eps, into.qk_offset = layer.eps, layer.offset, layer.qk_eps, layer.qk_offset
    into.scale, into.softcap, into.window = layer.scale, layer.softcap, layer.window
