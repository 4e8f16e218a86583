"""Each block format as planes of codes, scales and minimums, elements in natural order.

A format is one function from raw blocks to planes; `dequantise` of the planes is the only dequantiser there is. Layouts
are those of ggml's block structures; all scales are float16 (`d`, `dmin`) widened to float32, and sub-scales multiply
them in float32, as the reference does.

Letters: B blocks, S sub-scales of a block, Q bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import FormatError
from lockstep.core.tensors import QuantPlanes
from lockstep.interop.gguf.formats import BY_NAME, TensorType

Bytes = NDArray[Any]  # uint8; numpy's stubs widen `uint8 & 15`
Parts = tuple[NDArray, NDArray, NDArray | None]
"""(codes [B, block], scales [B, S], minimums [B, S] or None)."""

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
# Twice the value of the 4-bit float (sign, 2 exponent bits, 1 mantissa bit); the block's scale is halved for it.
FP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


@dataclass(frozen=True)
class BlockLayout:
    """How a format's blocks come apart."""

    split: Callable[[Bytes], Parts]
    group: int
    bits: int
    low: int
    table: NDArray[np.int8] | None = None


def _half(raw: Bytes) -> NDArray[np.float32]:
    """Two bytes a block to float32 [B, 1]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: Bytes, run: int) -> Bytes:
    """Low nibbles of each `run` bytes, then their high nibbles: [B, 2 * Q]."""
    pairs = raw.reshape(len(raw), -1, 1, run)
    return np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(len(raw), -1)


def _bit_pairs(raw: Bytes) -> Bytes:
    """Of each 32 bytes the lowest bit pairs, then the next, up to the highest: [B, 4 * Q]."""
    pairs = raw.reshape(len(raw), -1, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return ((pairs >> shifts) & 3).reshape(len(raw), -1)


def _bit_planes(raw: Bytes) -> Bytes:
    """Bit 0 of 32 bytes, then bit 1, up to bit 7: [B, 256]."""
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    return ((raw.reshape(len(raw), 1, 32) >> shifts) & 1).reshape(len(raw), -1)


def _fifth_bits(raw: Bytes) -> Bytes:
    """32 bits, lowest first, as 0 or 16: [B, 32]."""
    return np.unpackbits(raw, axis=1, bitorder="little") << 4


def _q8_0(blocks: Bytes) -> Parts:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks[:, :2]), None


def _q4_0(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 2:], 16).view(np.int8) - np.int8(8), _half(blocks[:, :2]), None


def _q4_1(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 4:], 16), _half(blocks[:, :2]), _half(blocks[:, 2:4])


def _q5_0(blocks: Bytes) -> Parts:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return codes.view(np.int8) - np.int8(16), _half(blocks[:, :2]), None


def _q5_1(blocks: Bytes) -> Parts:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return codes, _half(blocks[:, :2]), _half(blocks[:, 2:4])


def _q2_k(blocks: Bytes) -> Parts:
    sub, codes = blocks[:, :16], _bit_pairs(blocks[:, 16:80])
    d, dmin = _half(blocks[:, 80:82]), _half(blocks[:, 82:84])
    return codes, d * (sub & 15).astype(np.float32), -(dmin * (sub >> 4).astype(np.float32))


def _q3_k(blocks: Bytes) -> Parts:
    # A set bit in the mask means that 4 is not subtracted.
    high = _bit_planes(blocks[:, :32]) << 2
    codes = (_bit_pairs(blocks[:, 32:96]) | high).view(np.int8) - np.int8(4)
    low4 = _nibbles(blocks[:, 96:104], 8)
    top = blocks[:, 104:108].reshape(-1, 1, 4) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    sub = (low4 | ((top & 3) << 4).reshape(-1, 16)).view(np.int8) - np.int8(32)
    return codes, _half(blocks[:, 108:110]) * sub.astype(np.float32), None


def _six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight 6-bit scales and eight 6-bit minimums out of 12 bytes: two [B, 8]."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minimums = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales, minimums


def _scaled_pairs(blocks: Bytes) -> tuple[NDArray, NDArray]:
    scales, minimums = _six_bit_pairs(blocks[:, 4:16])
    d, dmin = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    return d * scales.astype(np.float32), -(dmin * minimums.astype(np.float32))


def _q4_k(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 16:], 32), *_scaled_pairs(blocks)


def _q5_k(blocks: Bytes) -> Parts:
    codes = _nibbles(blocks[:, 48:], 32) | (_bit_planes(blocks[:, 16:48]) << 4)
    return codes, *_scaled_pairs(blocks)


def _q6_k(blocks: Bytes) -> Parts:
    codes = _nibbles(blocks[:, :128], 64) | (_bit_pairs(blocks[:, 128:192]) << 4)
    sub = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return codes.view(np.int8) - np.int8(32), _half(blocks[:, 208:210]) * sub.astype(np.float32), None


def _iq4_nl(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 2:], 16), _half(blocks[:, :2]), None


def _iq4_xs(blocks: Bytes) -> Parts:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> (2 * np.arange(8, dtype=np.uint16)).reshape(1, 8)
    pairs = blocks[:, 4:8].reshape(-1, 4, 1)
    low = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8)
    sub = (low | ((high & 3) << 4).astype(np.uint8)).view(np.int8) - np.int8(32)
    return _nibbles(blocks[:, 8:], 16), _half(blocks[:, :2]) * sub.astype(np.float32), None


def half_power(exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """2^(e - 128): half of the scale that an 8-bit exponent stands for, subnormal below e = 2. No NaN: 255 is 2^127."""
    wide = exponents.astype(np.uint32)
    bits = np.where(wide < 2, np.uint32(0x00200000) << np.minimum(wide, 1), (wide - np.minimum(wide, 1)) << 23)
    return bits.astype(np.uint32).view(np.float32)


def _mxfp4(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 1:], 16), half_power(np.ascontiguousarray(blocks[:, :1])), None


LAYOUTS: dict[str, BlockLayout] = {
    "Q8_0": BlockLayout(_q8_0, 32, 8, -128),
    "Q4_0": BlockLayout(_q4_0, 32, 4, -8),
    "Q4_1": BlockLayout(_q4_1, 32, 4, 0),
    "Q5_0": BlockLayout(_q5_0, 32, 5, -16),
    "Q5_1": BlockLayout(_q5_1, 32, 5, 0),
    "Q2_K": BlockLayout(_q2_k, 16, 2, 0),
    "Q3_K": BlockLayout(_q3_k, 16, 3, -4),
    "Q4_K": BlockLayout(_q4_k, 32, 4, 0),
    "Q5_K": BlockLayout(_q5_k, 32, 5, 0),
    "Q6_K": BlockLayout(_q6_k, 16, 6, -32),
    "IQ4_NL": BlockLayout(_iq4_nl, 32, 4, 0, IQ4_VALUES),
    "IQ4_XS": BlockLayout(_iq4_xs, 32, 4, 0, IQ4_VALUES),
    "MXFP4": BlockLayout(_mxfp4, 32, 4, 0, FP4_VALUES),
}


def unpack(kind: str, data: Bytes, shape: tuple[int, int]) -> QuantPlanes:
    """Take a quantised matrix apart.

    Args:
        kind: the block format, a key of `LAYOUTS`.
        data: its bytes, uint8 of any shape, N * K / block * block bytes of them.
        shape: (N, K).

    Returns:
        planes whose `dequantise()` is bit for bit the format's value (NaN where the reference has NaN).

    Raises:
        FormatError: a format without planes, or a size that does not fit.
    """
    layout, block = _layout(kind)
    num_rows, num_columns = shape
    if num_columns % block.block_size or data.size * block.block_size != num_rows * num_columns * block.block_bytes:
        raise FormatError(f"{data.size} bytes are not a {kind} matrix of {num_rows} x {num_columns}")
    with np.errstate(all="ignore"):
        codes, scales, minimums = layout.split(np.ascontiguousarray(data).reshape(-1, block.block_bytes))
    return QuantPlanes(
        codes.view(np.int8).reshape(num_rows, num_columns),
        scales.reshape(num_rows, -1),
        None if minimums is None else minimums.reshape(num_rows, -1),
        layout.group,
        layout.bits,
        layout.low,
        layout.table,
    )


def _layout(kind: str) -> tuple[BlockLayout, TensorType]:
    if kind not in LAYOUTS:
        raise FormatError(f"tensor type {kind} cannot be dequantised here; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[kind], BY_NAME[kind]
