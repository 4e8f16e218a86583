"""Quantisers that search for the scale of least squared error: K-quants, IQ4_NL, MXFP4.

Each group tries a few scales around the obvious one, assigns codes, solves the least-squares scale (and minimum) for
those codes and keeps the best; then the scales themselves are quantised and the codes assigned anew to what is stored.

Letters: B blocks, S groups of a block, L elements of a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import InputError
from lockstep.interop.gguf.unpack import FP4_VALUES, IQ4_VALUES, half_power

Floats = NDArray[np.float32]
Bytes = NDArray[Any]  # uint8; numpy's stubs widen `uint8 & 15`


def _half(values: Floats, kind: str) -> tuple[Bytes, Floats]:
    """Stored bytes, and the float32 a reader will see."""
    half = values.astype("<f2")
    if not np.isfinite(half).all():
        raise InputError(f"values are too large for the 16-bit scale of {kind}", field="values")
    return half.view(np.uint8), half.astype(np.float32)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, 0 where that is not finite."""
    ratio = top / bottom
    return np.where(np.isfinite(ratio), ratio, np.float32(0))


def _fit_affine(x_BSL: Floats, top: int) -> tuple[Floats, Floats]:
    """Scale and non-negative offset so that x is near scale * code - offset, codes 0..top: two [B, S, 1]."""
    low = np.minimum(x_BSL.min(axis=2, keepdims=True), 0)
    span = x_BSL.max(axis=2, keepdims=True) - low
    best_scale, best_offset = span / np.float32(top), -low
    best_error = _affine_error(x_BSL, best_scale, best_offset, top)
    for shrink in (-0.9, -0.45, 0.0, 0.45, 0.9):
        trial = span / np.float32(top + shrink)
        codes = np.clip(np.rint(_ratio(x_BSL - low, trial)), 0, top)
        scale, offset = _solve_affine(x_BSL, codes)
        error = _affine_error(x_BSL, scale, offset, top)
        better = error < best_error
        best_scale, best_offset = np.where(better, scale, best_scale), np.where(better, offset, best_offset)
        best_error = np.where(better, error, best_error)
    return best_scale, best_offset


def _solve_affine(x_BSL: Floats, codes_BSL: Floats) -> tuple[Floats, Floats]:
    """Least squares of x = scale * code - offset; a solution outside scale, offset >= 0 moves to that border."""
    num = np.float32(x_BSL.shape[2])
    sum_c, sum_x = codes_BSL.sum(axis=2, keepdims=True), x_BSL.sum(axis=2, keepdims=True)
    sum_cc, sum_cx = (codes_BSL**2).sum(axis=2, keepdims=True), (codes_BSL * x_BSL).sum(axis=2, keepdims=True)
    scale = _ratio(num * sum_cx - sum_c * sum_x, num * sum_cc - sum_c**2)
    offset = (scale * sum_c - sum_x) / num
    scale = np.where(offset < 0, _ratio(sum_cx, sum_cc), scale)
    return np.maximum(scale, 0), np.maximum(offset, 0)


def _affine_error(x_BSL: Floats, scale: Floats, offset: Floats, top: int) -> Floats:
    codes = np.clip(np.rint(_ratio(x_BSL + offset, scale)), 0, top)
    error: Floats = ((scale * codes - offset - x_BSL) ** 2).sum(axis=2, keepdims=True)
    return error


def _affine_super_block(values: Floats, top: int, kind: str) -> tuple[list[Bytes], Bytes]:
    """Header of a Q4_K or Q5_K block (d, dmin, 12 bytes of sub-scales) and codes [B, 256]."""
    x_BSL = values.reshape(-1, 8, 32)
    scale, offset = _fit_affine(x_BSL, top)
    d_bytes, d = _half(scale.max(axis=1) / 63, kind)
    dmin_bytes, dmin = _half(offset.max(axis=1) / 63, kind)
    sub = np.clip(np.rint(_ratio(scale[:, :, 0], d)), 0, 63)
    sub_min = np.clip(np.rint(_ratio(offset[:, :, 0], dmin)), 0, 63)
    stored, stored_min = (d * sub)[:, :, None], (dmin * sub_min)[:, :, None]
    codes = np.clip(np.rint(_ratio(x_BSL + stored_min, stored)), 0, top).astype(np.uint8)
    packed = _pack_six_bits(sub.astype(np.uint8), sub_min.astype(np.uint8))
    return [d_bytes, dmin_bytes, packed], codes.reshape(len(values), 256)


def _pack_six_bits(scales: Bytes, minimums: Bytes) -> Bytes:
    """Two [B, 8] of 6 bits to 12 bytes: the first four whole, of the last four the low nibbles apart from the rest."""
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minimums[:, :4] | ((minimums[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((minimums[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], axis=1)


def _pack_nibble_runs(codes: Bytes, run: int) -> Bytes:
    pairs = codes.reshape(len(codes), -1, 2, run)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(codes), -1)


def q4_k(values: Floats) -> Bytes:
    """float32 [B, 256] to Q4_K blocks [B, 144]."""
    header, codes = _affine_super_block(values, 15, "Q4_K")
    return np.concatenate([*header, _pack_nibble_runs(codes, 32)], axis=1)


def q5_k(values: Floats) -> Bytes:
    """float32 [B, 256] to Q5_K blocks [B, 176]."""
    header, codes = _affine_super_block(values, 31, "Q5_K")
    high = ((codes >> 4).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8).reshape(1, 8, 1)).sum(
        axis=1, dtype=np.uint8
    )
    return np.concatenate([*header, high, _pack_nibble_runs(codes & 15, 32)], axis=1)


def q6_k(values: Floats) -> Bytes:
    """float32 [B, 256] to Q6_K blocks [B, 210]."""
    x_BSL = values.reshape(-1, 16, 16)
    scale = _fit_symmetric(x_BSL, 32)
    widest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)[:, :, 0]
    d_bytes, d = _half(widest / np.float32(-128), "Q6_K")
    sub = np.clip(np.rint(_ratio(scale[:, :, 0], d)), -128, 127)
    codes = np.clip(np.rint(_ratio(x_BSL, (d * sub)[:, :, None])), -32, 31).astype(np.int8).reshape(len(values), 256)
    raw = (codes + np.int8(32)).view(np.uint8)
    pairs = (raw >> 4).reshape(len(raw), 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = pairs.sum(axis=2, dtype=np.uint8).reshape(len(raw), 64)
    return np.concatenate([_pack_nibble_runs(raw & 15, 64), high, sub.astype(np.int8).view(np.uint8), d_bytes], axis=1)


def _fit_symmetric(x_BSL: Floats, low: int) -> Floats:
    """Signed scale so that x is near scale * code, codes -low..low-1: [B, S, 1]."""
    peak = np.take_along_axis(x_BSL, np.abs(x_BSL).argmax(axis=2)[:, :, None], axis=2)
    best, best_error = np.zeros_like(peak), (x_BSL**2).sum(axis=2, keepdims=True)
    for wider in (-0.9, -0.45, 0.0, 0.45, 0.9):
        codes = np.clip(np.rint(_ratio(x_BSL, peak / np.float32(-low + wider))), -low, low - 1)
        scale = _ratio((codes * x_BSL).sum(axis=2, keepdims=True), (codes**2).sum(axis=2, keepdims=True))
        error = ((scale * codes - x_BSL) ** 2).sum(axis=2, keepdims=True)
        best, best_error = np.where(error < best_error, scale, best), np.minimum(error, best_error)
    return best


_IQ4_BORDERS = (IQ4_VALUES[1:].astype(np.float32) + IQ4_VALUES[:-1]) / 2


def _nearest_iq4(scaled: Floats) -> NDArray[np.intp]:
    return np.searchsorted(_IQ4_BORDERS, scaled)


def iq4_nl(values: Floats) -> Bytes:
    """float32 [B, 32] to IQ4_NL blocks [B, 18]."""
    peak = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)
    best, best_error = np.zeros_like(peak), (values**2).sum(axis=1, keepdims=True)
    for level in (-139, -133, -127, -121, -115, 107, 113, 119):
        levels = IQ4_VALUES[_nearest_iq4(_ratio(values, peak / np.float32(level)))].astype(np.float32)
        scale = _ratio((levels * values).sum(axis=1, keepdims=True), (levels**2).sum(axis=1, keepdims=True))
        error = ((scale * levels - values) ** 2).sum(axis=1, keepdims=True)
        best, best_error = np.where(error < best_error, scale, best), np.minimum(error, best_error)
    d_bytes, d = _half(best, "IQ4_NL")
    codes = _nearest_iq4(_ratio(values, d)).astype(np.uint8)
    return np.concatenate([d_bytes, _pack_nibble_runs(codes, 16)], axis=1)


# The codes of the eight magnitudes and, above, the borders between them; a set bit 3 is the sign.
_FP4_BORDERS = (FP4_VALUES[1:8].astype(np.float32) + FP4_VALUES[:7]) / 2


def mxfp4(values: Floats) -> Bytes:
    """float32 [B, 32] to MXFP4 blocks [B, 17]: of the exponent that just holds the peak and its neighbour the better."""
    peak = np.abs(values).max(axis=1, keepdims=True)
    # frexp: peak = fraction * 2^power with fraction in [0.5, 1); the largest value is 6 = 1.5 * 2^2.
    power = np.frexp(peak)[1] - 1
    best_codes, best_exponent = np.zeros(values.shape, np.uint8), np.zeros(peak.shape, np.uint8)
    best_error = np.full(peak.shape, np.inf)
    for above in (0, 1):
        exponent = np.where(peak > 0, np.clip(power - 2 + 127 + above, 0, 254), 0).astype(np.uint8)
        scale = half_power(exponent)
        codes = np.searchsorted(_FP4_BORDERS, np.abs(values / scale)).astype(np.uint8)
        codes |= np.where((values < 0) & (codes > 0), np.uint8(8), np.uint8(0))
        error = ((scale * FP4_VALUES[codes].astype(np.float32) - values).astype(np.float64) ** 2).sum(
            axis=1, keepdims=True
        )
        better = error < best_error
        best_codes, best_exponent = np.where(better, codes, best_codes), np.where(better, exponent, best_exponent)
        best_error = np.minimum(error, best_error)
    return np.concatenate([best_exponent, _pack_nibble_runs(best_codes, 16)], axis=1)
