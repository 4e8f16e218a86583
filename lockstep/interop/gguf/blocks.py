"""Numbers to block formats and back.

`quantise` gives the reference's bytes for F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1; Q4_K, Q5_K, Q6_K, IQ4_NL and MXFP4
come from searches of our own (`search.py`): valid blocks, other bytes than the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import FormatError, InputError, unknown_name
from lockstep.interop.gguf import search
from lockstep.interop.gguf.formats import BY_NAME
from lockstep.interop.gguf.unpack import LAYOUTS, unpack
from lockstep.kernels import num_threads

Floats = NDArray[np.float32]
Bytes = NDArray[Any]  # uint8; numpy's stubs widen `uint8 & 15`

CHUNK_ELEMENTS = 1 << 18

# Beyond any 16-bit scale times code, and small enough that squares stay finite in the searches.
LARGEST = 1e9

PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


def dequantise(kind: str, data: Bytes, shape: tuple[int, ...]) -> Floats:
    """Any readable tensor type as float32.

    Args:
        kind: type name, such as "Q4_K".
        data: the bytes, uint8.
        shape: element shape, rows last.

    Raises:
        FormatError: a type that is not read here, or a size that does not fit.
    """
    block = BY_NAME.get(kind)
    num_elements = int(np.prod(shape, dtype=np.int64))
    if block is None or data.size * block.block_size != num_elements * block.block_bytes:
        raise FormatError(f"{data.size} bytes are not a {kind} tensor of {list(shape)}")
    raw = np.ascontiguousarray(data).reshape(-1)
    if kind in PLAIN:
        return raw.view(PLAIN[kind]).astype(np.float32).reshape(shape)
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    columns = shape[-1]
    return unpack(kind, raw, (num_elements // columns, columns)).dequantise().reshape(shape)


def quantise(kind: str, values: NDArray) -> Bytes:
    """Finite numbers to blocks.

    Args:
        kind: a key of `QUANTISERS`, or F32.
        values: floating point [..., K], K a multiple of the block size.

    Returns:
        uint8 [..., bytes of a row].

    Raises:
        InputError: a format that cannot be written, rows that are no whole blocks, values that are not finite or that
            overflow the format's scale.
    """
    if kind not in QUANTISERS:
        raise InputError(unknown_name("format to quantise to", kind, QUANTISERS), field="kind")
    block = BY_NAME[kind]
    if values.shape[-1] % block.block_size:
        raise InputError(
            f"{kind} needs rows of a multiple of {block.block_size}, got {values.shape[-1]}; keep this tensor in F16",
            field="values",
        )
    flat = np.ascontiguousarray(values, np.float32).reshape(-1, block.block_size)
    out = np.empty((len(flat), block.block_bytes), np.uint8)
    step = max(1, CHUNK_ELEMENTS // block.block_size)

    def fill(start: int) -> None:
        chunk = flat[start : start + step]
        if block.block_size > 1 and not np.isfinite(chunk).all():
            raise InputError(f"{kind} cannot hold NaN or infinity", field="values")
        if block.block_size > 1 and kind != "MXFP4" and np.abs(chunk).max(initial=0) > LARGEST:
            raise InputError(f"values are too large for the 16-bit scale of {kind}", field="values")
        with np.errstate(all="ignore"):
            out[start : start + step] = QUANTISERS[kind](chunk)

    starts = range(0, len(flat), step)
    if len(starts) == 1 or num_threads() == 1:
        for start in starts:
            fill(start)
    else:
        # numpy leaves the interpreter to others while it works.
        with ThreadPoolExecutor(num_threads()) as pool:
            for _ in pool.map(fill, starts):
                pass
    return out.reshape(*values.shape[:-1], -1)


def _f32(values: Floats) -> Bytes:
    return values.view(np.uint8)


def _f16(values: Floats) -> Bytes:
    return values.astype("<f2").view(np.uint8)


def _bf16(values: Floats) -> Bytes:
    """Round to nearest even; a NaN stays a NaN (quiet)."""
    bits = values.view(np.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    return np.where(is_nan, (bits >> 16) | 0x40, rounded >> 16).astype("<u2").view(np.uint8)


def _half_bytes(values: Floats, kind: str) -> Bytes:
    half = values.astype("<f2")
    if not np.isfinite(half).all():
        raise InputError(f"values are too large for the 16-bit scale of {kind}", field="values")
    return half.view(np.uint8)


def _inverse(scale: Floats) -> Floats:
    """1 / scale; 0 where the scale is 0 or so small that its inverse overflows (float16 stores it as 0 anyway)."""
    inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _pack_nibbles(codes: Bytes) -> Bytes:
    return codes[:, :16] | (codes[:, 16:] << 4)


def _q8_0(values: Floats) -> Bytes:
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scaled = values * _inverse(scale)
    # Half away from zero, exact where adding 0.5 would round the sum first.
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    codes = np.copysign(whole + (magnitude - whole >= 0.5), scaled).astype(np.int8)
    return np.concatenate([_half_bytes(scale, "Q8_0"), codes.view(np.uint8)], axis=1)


def _signed_codes(values: Floats, low: int) -> tuple[Floats, Bytes]:
    """The element of largest magnitude gets code `low`; codes come back with `low` subtracted."""
    peak = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    scale = peak / np.float32(low)
    codes = np.trunc(values * _inverse(scale) + np.float32(0.5 - low))
    return scale, np.clip(codes, 0, -2 * low - 1).astype(np.uint8)


def _offset_codes(values: Floats, top: int) -> tuple[Floats, Floats, Bytes]:
    low = values.min(axis=1, keepdims=True)
    scale = (values.max(axis=1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((values - low) * _inverse(scale) + np.float32(0.5))
    return scale, low, np.clip(codes, 0, top).astype(np.uint8)


def _fifth_bits(codes: Bytes) -> Bytes:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _q4_0(values: Floats) -> Bytes:
    scale, codes = _signed_codes(values, -8)
    return np.concatenate([_half_bytes(scale, "Q4_0"), _pack_nibbles(codes)], axis=1)


def _q4_1(values: Floats) -> Bytes:
    scale, low, codes = _offset_codes(values, 15)
    return np.concatenate([_half_bytes(scale, "Q4_1"), _half_bytes(low, "Q4_1"), _pack_nibbles(codes)], axis=1)


def _q5_0(values: Floats) -> Bytes:
    scale, codes = _signed_codes(values, -16)
    return np.concatenate([_half_bytes(scale, "Q5_0"), _fifth_bits(codes), _pack_nibbles(codes & 15)], axis=1)


def _q5_1(values: Floats) -> Bytes:
    scale, low, codes = _offset_codes(values, 31)
    halves = [_half_bytes(scale, "Q5_1"), _half_bytes(low, "Q5_1")]
    return np.concatenate([*halves, _fifth_bits(codes), _pack_nibbles(codes & 15)], axis=1)


QUANTISERS: dict[str, Callable[[Floats], Bytes]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": search.q4_k,
    "Q5_K": search.q5_k,
    "Q6_K": search.q6_k,
    "IQ4_NL": search.iq4_nl,
    "MXFP4": search.mxfp4,
}

READABLE = (*PLAIN, "BF16", *LAYOUTS)
"""Tensor types that `dequantise` takes."""
