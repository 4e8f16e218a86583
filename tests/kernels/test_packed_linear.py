"""Products with packed matrices: fast against naive, rows that do not depend on their company, layouts, errors.

Legend: M rows, N outputs, K inputs, X experts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from lockstep import kernels
from lockstep.core.planes import QuantPlanes
from lockstep.kernels import native
from lockstep.kernels.packed_linear import PackedWeight, grouped_linear, pack, pack_planes, packed_linear, stack, unpack

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
    weight, x = torch.randn(num_outputs, num_inputs), torch.randn(7, num_inputs)
    packed = pack(weight, name)
    if name == "bf16":
        weight, x = weight.bfloat16().float(), x.bfloat16().float()
    assert torch.equal(unpack(packed), weight)
    torch.testing.assert_close(packed_linear(x, packed), x @ weight.T, rtol=1e-5, atol=2e-4)


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
