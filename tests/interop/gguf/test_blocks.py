"""Block formats, judged by the format's own package: bit for bit where it can, by error where it cannot."""

from __future__ import annotations

import warnings

import gguf
import numpy as np
import pytest

from lockstep.core.errors import FormatError, InputError
from lockstep.interop.gguf import LAYOUTS, QUANTISERS, READABLE, GGUFBlocks, dequantise, quantise, unpack
from lockstep.interop.gguf.formats import BY_NAME

SAME_BYTES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
# Relative root mean square error on normal values; what each format can do with as many bits, with a little room.
ERRORS = {"Q4_K": 0.075, "Q5_K": 0.038, "Q6_K": 0.019, "IQ4_NL": 0.078, "MXFP4": 0.116}


def judge(kind: str, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    """Equal bits, zeros' signs included; any NaN is like any other."""
    return bool(((got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))).all())


def random_blocks(kind: str, seed: int) -> np.ndarray:
    """Rows of uniformly random bytes: codes of every value, scales of every exponent, infinite and NaN ones too."""
    block = BY_NAME[kind]
    num = 3 if block.block_size > 1 else 192
    return np.random.default_rng(seed).integers(0, 256, (33, num * block.block_bytes), dtype=np.uint8)


@pytest.mark.parametrize("kind", [name for name in READABLE if name not in ("F64", "I8", "I16", "I32", "I64")])
def test_dequantise_gives_the_references_bits(kind: str) -> None:
    raw = random_blocks(kind, seed=1)
    want = judge(kind, raw)
    assert same_bits(dequantise(kind, raw, want.shape), want)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("filler", [0x00, 0xFF, 0x7C, 0xFC, 0x80, 0x01])
def test_dequantise_adversarial_blocks(kind: str, filler: int) -> None:
    """Blocks of one byte: zero, NaN (ff), infinite (7c, fc), negative zero and tiny scales."""
    raw = np.full((2, 2 * BY_NAME[kind].block_bytes), filler, np.uint8)
    want = judge(kind, raw)
    assert same_bits(dequantise(kind, raw, want.shape), want)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_planes(kind: str) -> None:
    """Codes lie where the layout says, planes have the promised shapes, and a range of rows is that range."""
    raw, layout = random_blocks(kind, seed=2), LAYOUTS[kind]
    num_columns = raw.shape[1] // BY_NAME[kind].block_bytes * BY_NAME[kind].block_size
    planes = unpack(kind, raw, (33, num_columns))
    assert planes.codes.shape == (33, num_columns)
    assert planes.codes.dtype == np.int8
    assert (planes.codes.min(), planes.codes.max()) == (layout.low, layout.low + 2**layout.bits - 1)
    assert planes.scales.shape == (33, num_columns // planes.group)
    assert planes.minimums is None or planes.minimums.shape == planes.scales.shape
    assert same_bits(planes.dequantise(), judge(kind, raw))
    kernel = planes.for_kernels()
    assert same_bits(kernel.dequantise().numpy(), planes.dequantise())
    values = set(kernel.codes_NK.flatten().tolist())
    assert values <= set(kernel.table or (range(-8, 8) if kernel.bits == 4 else range(-128, 128)))
    assert (kernel.bits == 4) == (layout.bits <= 4)
    part = GGUFBlocks(kind, (33, num_columns), raw).planes(5, 9)
    assert np.array_equal(part.codes, planes.codes[5:9])
    assert same_bits(part.dequantise(), planes.dequantise()[5:9])


@pytest.mark.parametrize("kind", SAME_BYTES)
@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 300.0])
def test_quantise_gives_the_references_bytes(kind: str, scale: float) -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((70, 96)) * scale).astype(np.float32)
    values[3] = 0
    values[5, :32] = values[5, 0]
    values[7] = np.round(values[7] / scale) * scale
    with np.errstate(all="ignore"):
        want = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(quantise(kind, values), np.ascontiguousarray(want).view(np.uint8))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_special_values_survive_16_bits(kind: str) -> None:
    values = np.array([[0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 65504.0, 3e38]], np.float32)
    with np.errstate(over="ignore"):
        want = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(quantise(kind, values), want.view(np.uint8))


@pytest.mark.parametrize("kind", ERRORS)
def test_searched_formats(kind: str) -> None:
    """Error on normal values, exactness on zero, and no harm from offsets, tiny and large magnitudes."""
    rng = np.random.default_rng(4)
    values = rng.standard_normal((64, 512)).astype(np.float32)

    def error(x: np.ndarray) -> float:
        got = judge(kind, quantise(kind, x))
        return float(np.sqrt(((got - x) ** 2).mean() / (x**2).mean()))

    assert error(values) < ERRORS[kind]
    for scale in (1e-3, 200.0):
        assert error(values * np.float32(scale)) < 1.1 * ERRORS[kind]
    assert error(np.abs(values) + np.float32(0.5)) < 1.2 * ERRORS[kind]
    one = np.zeros((1, 256), np.float32)
    assert not judge(kind, quantise(kind, one)).any()
    one[0, 17] = -2.5
    assert abs(judge(kind, quantise(kind, one)) - one).max() <= {"MXFP4": 0.5, "IQ4_NL": 0.02}.get(kind, 0.005)


def test_search_beats_the_plain_rule() -> None:
    """Trying scales must pay: against four bits with the obvious scale, and against the reference's MXFP4."""
    values = np.random.default_rng(5).standard_normal((64, 512)).astype(np.float32)

    def error(raw: np.ndarray, kind: str) -> float:
        return float(((judge(kind, raw) - values) ** 2).mean())

    assert error(quantise("IQ4_NL", values), "IQ4_NL") < 0.8 * error(quantise("Q4_0", values), "Q4_0")
    assert error(quantise("Q4_K", values), "Q4_K") < 0.9 * error(quantise("Q4_1", values), "Q4_1")
    reference = gguf.quants.quantize(values, gguf.GGMLQuantizationType.MXFP4)
    assert error(quantise("MXFP4", values), "MXFP4") < 0.95 * error(reference, "MXFP4")


def test_large_matrices_go_in_chunks() -> None:
    """More blocks than one chunk holds give the bytes of each row alone."""
    values = np.random.default_rng(6).standard_normal((1025, 1056)).astype(np.float32)
    whole = quantise("Q8_0", values)
    assert np.array_equal(whole[-2:], quantise("Q8_0", values[-2:]))
    assert np.array_equal(whole[992:995], quantise("Q8_0", values[992:995]))


def test_what_cannot_be_quantised() -> None:
    values = np.ones((2, 64), np.float32)
    with pytest.raises(InputError, match=r"unknown format.*did you mean 'Q4_"):
        quantise("Q4_O", values)
    with pytest.raises(InputError, match="multiple of 32, got 48"):
        quantise("Q8_0", values[:, :48])
    for kind in set(QUANTISERS) - {"F32", "F16", "BF16", "MXFP4"}:
        big = np.zeros((1, 256), np.float32)
        for size in (3e38, 8e8):
            big[0, 3] = size
            with pytest.raises(InputError, match="too large"):
                quantise(kind, big)
        big[0, 0] = np.nan
        with pytest.raises(InputError, match="NaN"):
            quantise(kind, big)


def test_mxfp4_holds_any_magnitude() -> None:
    """Its scale is a power of two over float32's whole range."""
    values = np.random.default_rng(7).standard_normal((8, 64)).astype(np.float32)
    for power in (-120, 120):
        scaled = np.ldexp(values, power)
        assert np.array_equal(
            np.ldexp(judge("MXFP4", quantise("MXFP4", values)), power), judge("MXFP4", quantise("MXFP4", scaled))
        )


def test_what_cannot_be_dequantised() -> None:
    with pytest.raises(FormatError, match="IQ2_XXS cannot be dequantised"):
        dequantise("IQ2_XXS", np.zeros(66, np.uint8), (1, 256))
    with pytest.raises(FormatError, match="18 bytes are not a Q4_0"):
        dequantise("Q4_0", np.zeros(18, np.uint8), (1, 64))
