"""Blocks of quantised files packed at once, against their planes packed; rows of packed matrices against all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lockstep import kernels
from lockstep.core.errors import FormatError, InputError
from lockstep.interop.gguf import LAYOUTS, GGUFBlocks
from lockstep.interop.gguf.formats import BY_NAME
from lockstep.kernels.packed_linear import pack, pack_blocks, pack_planes, unpack, unpack_some
from lockstep.kernels.packed_linear.blocks import BLOCKS, joined
from lockstep.kernels.packed_linear.packing import planes_of


def random_blocks(kind: str, num_rows: int, num_blocks: int, seed: int = 0) -> GGUFBlocks:
    """Every code, sub-scale and sign; the halves that scale a block are finite."""
    block, draw = BY_NAME[kind], np.random.default_rng(seed)
    raw = draw.integers(0, 256, (num_rows, num_blocks, block.block_bytes), dtype=np.uint8)
    first, num = {"Q2_K": (80, 2), "Q3_K": (108, 1), "Q6_K": (208, 1)}.get(kind, (0, 1))
    num = 2 if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else num
    if kind != "MXFP4":
        halves = draw.standard_normal((num_rows, num_blocks, num)) * draw.choice(
            [1e-7, 1e-3, 1.0, 3e4], (num_blocks, num)
        )
        raw[..., first : first + 2 * num] = np.clip(halves, -6e4, 6e4).astype("<f2").view(np.uint8)
    return GGUFBlocks(kind, (num_rows, num_blocks * block.block_size), raw.reshape(num_rows, -1))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_blocks_pack_as_their_planes(kind: str, level: int) -> None:
    parts = [random_blocks(kind, rows, 2 if kind in ("Q4_0",) else 3, rows) for rows in (7, 33, 1, 64)]
    parts[2] = replace(parts[2], data=np.repeat(parts[2].data, 2, axis=0)[::2])  # rows that do not follow each other
    got = pack_blocks(parts)
    want = pack_planes(joined([part.planes().for_kernels() for part in parts]))
    assert got.same_layout(want)
    if kind == "MXFP4":  # two of its places hold zero, and either may be written
        assert torch.equal(planes_of(got).codes_NK, planes_of(want).codes_NK)
        assert torch.equal(planes_of(got).scale_NB, planes_of(want).scale_NB)
    else:
        assert torch.equal(got.data, want.data)
    with kernels.force("naive"):
        assert torch.equal(pack_blocks(parts).data, want.data)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K", "IQ4_NL", "Q6_K", "fp32", "bf16", "int4"])
def test_rows_of_a_packed_matrix(kind: str, level: int) -> None:
    if kind in BLOCKS:
        packed = pack_blocks([random_blocks(kind, 70, 1)])
    else:
        packed = pack(torch.randn(70, 63 if kind != "int4" else 64), kind)
    whole, rows = unpack(packed), torch.tensor([69, 0, 3, 3, 64])
    assert torch.equal(unpack_some(packed, rows), whole[rows])
    assert unpack_some(packed, rows[:0]).shape == (0, packed.num_inputs)
    with kernels.force("naive"):
        assert torch.equal(unpack_some(packed, rows), whole[rows])


def test_refusals() -> None:
    good = random_blocks("Q4_K", 4, 1)
    with pytest.raises(InputError, match="no matrices"):
        pack_blocks([])
    with pytest.raises(InputError, match="one format and one width"):
        pack_blocks([good, random_blocks("Q8_0", 4, 8)])
    with pytest.raises(FormatError, match="are not a Q4_K matrix of 5 x 256"):
        pack_blocks([replace(good, shape=(5, 256))])
    for kind, byte, name in (("Q4_0", 1, "scale"), ("Q4_1", 3, "minimum"), ("Q4_K", 3, "minimum")):
        bad = random_blocks(kind, 4, 1)
        bad.data[2, byte] = 0x7C  # an infinity or a NaN
        for mode in ("auto", "naive"):
            with kernels.force(mode), pytest.raises(InputError, match=f"the {name} plane holds NaN or infinity"):  # type: ignore[arg-type]
                pack_blocks([bad])
    packed = pack_blocks([good])
    for rows in ([4], [-1, 0]):
        with pytest.raises(InputError, match=r"expected 0\.\.3"):
            unpack_some(packed, torch.tensor(rows))
