"""Products with packed matrices: fast against naive, rows that do not depend on their company, layouts, errors.

Legend: M rows, N outputs, K inputs, X experts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from lockstep import kernels
from lockstep.core.errors import ConfigError, InputError
from lockstep.core.planes import QuantPlanes
from lockstep.kernels import native
from lockstep.kernels.packed_linear import PackedWeight, grouped_linear, pack, pack_planes, packed_linear, stack, unpack
from lockstep.kernels.packed_linear.naive import quantise_rows

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FLOATS = ("fp32", "bf16")


def planes(num_outputs: int, num_inputs: int, group: int, bits: int, kind: str) -> QuantPlanes:
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    codes, table = torch.randint(low, high, (num_outputs, num_inputs)), None
    if kind == "table":
        table = IQ4_NL
        codes = torch.tensor(table)[torch.randint(0, 16, (num_outputs, num_inputs))]
    elif kind == "unsigned":
        table = tuple(range(16))
        codes = codes + 8
    scale = torch.rand(num_outputs, num_inputs // group)
    return QuantPlanes(
        codes_NK=codes.to(torch.int8),
        scale_NB=scale.half().float() if kind == "half" else scale,
        minimum_NB=torch.randn_like(scale) if kind in ("minimum", "unsigned") else None,
        group=group,
        bits=bits,
        table=table,
    )


# Name -> (bits, group, kind) of the planes.
PLANES = {
    "q8_0": (8, 32, "half"),
    "q6_k": (8, 16, "plain"),
    "q5_k": (8, 32, "minimum"),
    "q4_0": (4, 32, "half"),
    "q4_1": (4, 32, "unsigned"),
    "q2_k": (4, 16, "unsigned"),
    "iq4_nl": (4, 32, "table"),
    "int4_128": (4, 128, "plain"),
}


def make(name: str, num_outputs: int, num_inputs: int) -> PackedWeight:
    if name in FLOATS:
        return pack(torch.randn(num_outputs, num_inputs), name)
    bits, group, kind = PLANES[name]
    return pack_planes(planes(num_outputs, num_inputs, group, bits, kind))


def runnable_levels() -> list[int]:
    return list(range(native.open_level(0).ls_cpu_level() + 1)) if native.state.library is not None else []


@pytest.fixture(params=runnable_levels(), ids=lambda level: native.LEVELS[level])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    before = native.state.library
    native.state.library = native.open_level(request.param)
    yield request.param
    native.state.library = before


@pytest.mark.parametrize("name", [*FLOATS, *PLANES])
@pytest.mark.parametrize("num_outputs", [1, 17, 63, 200])
def test_equals_naive_on_every_level(level: int, name: str, num_outputs: int) -> None:
    packed, bias = make(name, num_outputs, 256 if name == "int4_128" else 96), torch.randn(num_outputs)
    for num_rows in (0, 1, 2, 5, 6, 20):
        x = torch.randn(num_rows, packed.num_inputs)
        for b in (bias, None):
            fast = packed_linear(x, packed, b)
            with kernels.force("naive"):
                slow = packed_linear(x, packed, b)
            if name in FLOATS or level == 0:  # the portable build has no fused multiply-add
                torch.testing.assert_close(fast, slow, rtol=2e-5, atol=2e-4)
            else:
                assert torch.equal(fast, slow)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(17, 1), (63, 63), (130, 1000), (64, 17)])
def test_odd_sizes(level: int, name: str, num_outputs: int, num_inputs: int) -> None:
    weight, x = torch.randn(num_outputs, num_inputs), torch.randn(31, num_inputs)
    packed = pack(weight, name)
    if name == "bf16":
        weight, x = weight.bfloat16().float(), x.bfloat16().float()
    assert torch.equal(unpack(packed), weight)
    found = packed_linear(x, packed)  # many rows, then few
    torch.testing.assert_close(found, x @ weight.T, rtol=1e-5, atol=2e-4)
    assert torch.equal(packed_linear(x[:7], packed), found[:7])


@pytest.mark.parametrize("name", [*FLOATS, *PLANES])
def test_rows_do_not_depend_on_their_company(name: str) -> None:
    """Random splits of 600 rows, on one thread and on two, as single matrix and as expert of a stack."""
    draw = random.Random(1)
    packed, bias = make(name, 77, 256), torch.randn(77)
    x = torch.randn(600, 256)
    whole = packed_linear(x, packed, bias)
    two = stack([make(name, 77, 256), packed])
    for num_threads in (1, 2):
        kernels.set_num_threads(num_threads)
        try:
            for _ in range(4):
                cuts = sorted(draw.sample(range(1, 600), draw.randint(1, 9)))
                parts = [packed_linear(part.clone(), packed, bias) for part in torch.tensor_split(x, cuts)]
                assert torch.equal(torch.cat(parts), whole)
                starts, biases = torch.tensor([0, cuts[0], 600]), torch.stack([torch.randn(77), bias])
                grouped = grouped_linear(x, two, starts, biases)
                assert torch.equal(grouped[cuts[0] :], whole[cuts[0] :])
            for row in (0, 299, 599):
                assert torch.equal(packed_linear(x[row : row + 1], packed, bias)[0], whole[row])
        finally:
            kernels.set_num_threads(1)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantising_a_float_matrix(format: str, group: int) -> None:
    """No value moves by more than half a step (int4: the far end of a symmetric range, one step)."""
    weight = torch.randn(40, 256) * 0.02
    weight[3] = 0.0
    packed = pack(weight, format, group)
    blocks, found = weight.view(40, -1, group), unpack(packed).view(40, -1, group)
    step = blocks.abs().amax(-1, keepdim=True) / (128 if format == "int8" else 8)
    assert bool(((found - blocks).abs() <= step * 1.01).all())
    assert float((found - blocks).pow(2).mean().sqrt() / blocks.std()) < (0.01 if format == "int8" else 0.12)
    assert packed.scale_bytes == 2
    padded = 64 / 40
    assert packed.bytes_per_weight == pytest.approx(padded * ((1 if format == "int8" else 0.5) + 2 / group))
    x = torch.randn(9, 256)
    close = (packed_linear(x, packed) - x @ unpack(packed).T).abs().max()
    assert float(close) < 0.02 * float((x @ weight.T).abs().max())


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_scales_outside_fp16_take_four_bytes(size: float) -> None:
    weight = torch.randn(33, 64) * size
    packed = pack(weight, "int8")
    assert packed.scale_bytes == 4
    torch.testing.assert_close(unpack(packed), weight, rtol=0, atol=0.02 * size)


@pytest.mark.parametrize("name", list(PLANES))
def test_planes_come_back(name: str) -> None:
    bits, group, kind = PLANES[name]
    source = planes(70, 256, group, bits, kind)
    packed = pack_planes(source)
    assert torch.equal(unpack(packed), source.dequantise())
    assert packed.scale_bytes == (2 if kind == "half" else 4)


@pytest.mark.parametrize("name", [*FLOATS, *PLANES])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(level: int, name: str, bad: float) -> None:
    packed, x = make(name, 40, 256), torch.randn(19, 256)
    x[5, 200] = bad
    y = packed_linear(x, packed)
    assert not bool(torch.isfinite(y[5]).any())
    if name in PLANES:
        assert bool(torch.isnan(y[5]).all())
    others = torch.arange(19) != 5
    assert bool(torch.isfinite(y[others]).all())


def test_rounding_of_rows(level: int) -> None:
    """A matrix of ones at the diagonal shows what the kernel made of each row: extremes, ties, tiny blocks, zeros."""
    x = torch.randn(5, 64)
    x[1] *= 3e38 / x[1].abs().max()
    x[2] *= 1e-38
    x[3] = 0.0
    x[4, :32] = torch.arange(-16, 16) + 0.5
    x[4, 31] = 127.0
    eye = QuantPlanes(codes_NK=torch.eye(64).to(torch.int8), scale_NB=torch.ones(64, 2), group=32, bits=8)
    integers, scale = quantise_rows(x)
    expected = (integers * scale.unsqueeze(-1)).view(5, 64)
    assert torch.equal(packed_linear(x, pack_planes(eye)), expected)
    assert int(integers.abs().max()) == 127
    assert torch.equal(integers[4, 0, :4], torch.tensor([-16.0, -14.0, -14.0, -12.0]))
    assert not bool(expected[2:4].any())


def test_strided_arguments() -> None:
    packed = make("q8_0", 33, 64)
    x, bias = torch.randn(64, 9).T, torch.randn(66)[::2]
    assert torch.equal(packed_linear(x, packed, bias), packed_linear(x.contiguous(), packed, bias.contiguous()))
    weight = torch.randn(64, 33).T
    for format in (*FLOATS, "int8"):
        assert torch.equal(unpack(pack(weight, format)), unpack(pack(weight.contiguous(), format)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FLOATS)
def test_packing_equals_naive(dtype: torch.dtype, format: str) -> None:
    weight = torch.randn(77, 31).to(dtype)
    weight[3, 4] = float("nan")
    fast = pack(weight, format)
    with kernels.force("naive"):
        slow = pack(weight, format)
    assert torch.equal(unpack(fast).isnan(), unpack(slow).isnan())
    assert torch.equal(unpack(fast).nan_to_num(), unpack(slow).nan_to_num())


def test_packing_again_into_the_same_memory() -> None:
    first, second = torch.randn(40, 64), torch.randn(40, 64)
    for format in (*FLOATS, "int8"):
        packed = pack(first, format)
        again = pack(second, format, into=packed)
        assert again.data.data_ptr() == packed.data.data_ptr()
        assert torch.equal(unpack(again), unpack(pack(second, format)))
    with pytest.raises(ConfigError, match="into is"):
        pack(first[:, :32], "fp32", into=pack(first, "fp32"))


@pytest.mark.skipif(native.state.library is None, reason="no compiled kernels")
def test_large_matrices_start_at_a_large_page() -> None:
    assert pack(torch.zeros(512, 512), "fp32").data.data_ptr() % (2 << 20) == 0


def test_errors_name_the_part() -> None:
    weight, x = torch.randn(8, 64), torch.randn(3, 64)
    packed = pack(weight, "int8")
    with pytest.raises(ConfigError, match="did you mean 'int8'"):
        pack(weight, "int9")
    with pytest.raises(ConfigError, match="use 32, 64 or 128"):
        pack(weight, "int4", 48)
    with pytest.raises(ConfigError, match="40 inputs"):
        pack(torch.randn(8, 40), "int8")
    with pytest.raises(ConfigError, match="96 inputs with group=64"):
        pack(torch.randn(8, 96), "int4", 64)
    for bad in (torch.randn(64), torch.randn(2, 3, 4), weight.double(), weight[:0]):
        with pytest.raises(InputError, match="weight is"):
            pack(bad, "fp32")
    with pytest.raises(InputError, match="NaN or infinity"):
        pack(torch.full((8, 64), float("inf")), "int8")
    for wrong in (torch.randn(3, 32), torch.randn(64), x.double(), x.bfloat16()):
        with pytest.raises(InputError, match="x is"):
            packed_linear(wrong, packed)
    for wrong in (torch.randn(9), torch.randn(8).double(), torch.randn(1, 8)):
        with pytest.raises(InputError, match="bias is"):
            packed_linear(x, packed, wrong)


def test_errors_of_planes() -> None:
    good = planes(8, 64, 32, 4, "plain")
    with pytest.raises(InputError, match=r"outside -8\.\.7"):
        pack_planes(replace(good, codes_NK=good.codes_NK * 2))
    with pytest.raises(InputError, match="4-bit planes hold codes outside"):
        pack_planes(replace(good, table=IQ4_NL))
    with pytest.raises(InputError, match="16 numbers"):
        pack_planes(replace(good, table=(1, 2, 3)))
    with pytest.raises(InputError, match="scale is"):
        pack_planes(replace(good, scale_NB=good.scale_NB[:, :1]))
    with pytest.raises(InputError, match="scale plane holds NaN"):
        pack_planes(replace(good, scale_NB=good.scale_NB * float("nan")))
    with pytest.raises(InputError, match="codes are"):
        pack_planes(replace(good, codes_NK=good.codes_NK.float()))
    with pytest.raises(ConfigError, match="bits=5"):
        pack_planes(replace(good, bits=5))


def test_errors_of_groups() -> None:
    x, packed = torch.randn(6, 64), make("q4_0", 8, 64)
    for starts in ([0, 3, 5], [1, 3, 6], [0, 7, 6], [0, 6]):
        with pytest.raises(InputError, match="starts is"):
            grouped_linear(x, [packed, packed], torch.tensor(starts))
    with pytest.raises(InputError, match="starts is"):
        grouped_linear(x, [packed, packed], torch.tensor([0, 3, 6], dtype=torch.int32))
    with pytest.raises(InputError, match="expert 1 differs"):
        grouped_linear(x, [packed, make("q8_0", 8, 64)], torch.tensor([0, 3, 6]))
    with pytest.raises(InputError, match="single matrix"):
        grouped_linear(x, packed, torch.tensor([0, 6]))
    with pytest.raises(InputError, match="no experts"):
        grouped_linear(x, [], torch.tensor([0]))
    with pytest.raises(InputError, match="a stack has one layout"):
        stack([packed, make("q4_0", 9, 64)])
    with pytest.raises(InputError, match="no matrices"):
        stack([])
