"""Counter-based noise: known answers, independence of the batch, distribution."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from lockstep import kernels
from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.noise import naive

needs_library = pytest.mark.skipif(native.state.library is None, reason="no compiled kernels")

# Known answers of the Random123 distribution for Philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert tuple(naive.philox(np.array(counter, np.uint32), key).tolist()) == expected


@needs_library
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_compiled_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    out = (ctypes.c_uint32 * 4)()
    native.lib().ls_philox((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
    assert tuple(out) == expected


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("rows", [1, 2, 63, 1000])
def test_twins_agree(rows: int, num: int) -> None:
    stream = torch.randint(0, 2**48, (rows,))
    position = torch.randint(0, 2**48, (rows,))
    seed = 0x1234_5678_9ABC_DEF0
    u, z = kernels.uniform(seed, stream, position, num), kernels.normal(seed, stream, position, num)
    with kernels.force("naive"):
        assert torch.equal(u, kernels.uniform(seed, stream, position, num))
        torch.testing.assert_close(z, kernels.normal(seed, stream, position, num), rtol=1e-5, atol=2e-6)
    if native.state.library is not None:
        words = np.full((rows, num), 7, np.uint32)
        native.lib().ls_noise_bits(seed, stream.data_ptr(), position.data_ptr(), words.ctypes.data, rows, num)
        assert np.array_equal(words, naive.bits(seed, stream.numpy(), position.numpy(), num))


@pytest.mark.parametrize("draw", [kernels.uniform, kernels.normal])
def test_value_depends_only_on_its_own_key(draw) -> None:  # type: ignore[no-untyped-def]
    stream, position = torch.arange(100), torch.arange(100) * 3
    whole = draw(5, stream, position, 7)
    for cut in (1, 37, 99):
        parts = [draw(5, s, p, 7) for s, p in zip(stream.split(cut), position.split(cut), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw(5, stream, position, 3), whole[:, :3].contiguous()) or draw is kernels.normal
    assert not torch.equal(draw(6, stream, position, 7), whole)


def test_columns_of_a_wider_draw_start_the_same() -> None:
    stream, position = torch.arange(10), torch.zeros(10, dtype=torch.int64)
    for draw in (kernels.uniform, kernels.normal):
        assert torch.equal(draw(0, stream, position, 5), draw(0, stream, position, 9)[:, :5])


def test_moments() -> None:
    stream, position = torch.arange(4000), torch.zeros(4000, dtype=torch.int64)
    z = kernels.normal(11, stream, position, 25).double().view(-1)
    u = kernels.uniform(12, stream, position, 25).double().view(-1)
    # 1e5 draws: the bounds are about five standard errors.
    assert abs(float(z.mean())) < 0.016
    assert abs(float(z.var()) - 1.0) < 0.023
    assert abs(float((z**4).mean()) - 3.0) < 0.16
    assert abs(float(u.mean()) - 0.5) < 0.0046
    assert float(u.min()) > 0.0
    assert float(u.max()) < 1.0


def test_out_is_filled_and_checked() -> None:
    stream = torch.arange(3)
    out = torch.full((3, 2), torch.nan)
    assert kernels.normal(1, stream, stream, 2, out=out) is out
    assert torch.isfinite(out).all()
    with pytest.raises(InputError, match="out is"):
        kernels.uniform(1, stream, stream, 3, out=out)
    with pytest.raises(InputError, match="int64"):
        kernels.uniform(1, stream.float(), stream, 3)


@pytest.mark.parametrize("size", [1, 1000, 3_000_000])
def test_uniform_index_is_its_twin_and_in_range(size: int) -> None:
    index = kernels.uniform_index(7, 1, 1 << 40, 999, size)
    assert np.array_equal(index.numpy(), naive.uniform_index(7, 1, 1 << 40, 999, size))
    assert 0 <= int(index.min()) <= int(index.max()) < size
    if size > 1:
        assert float(index.double().mean()) / size == pytest.approx(0.5, abs=0.04)
    with pytest.raises(InputError, match="size=0"):
        kernels.uniform_index(7, 1, 0, 1, 0)
