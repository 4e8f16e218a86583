"""Reference counter-based noise in NumPy: Philox4x32-10 (Salmon et al. 2011).

Legend: N rows, C columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Ten rounds on counters [..., 4]."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> _SHIFT) ^ c[1] ^ np.uint64(k0),
            b & _MASK,
            (a >> _SHIFT) ^ c[3] ^ np.uint64(k1),
            a & _MASK,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, -1).astype(np.uint32)


def bits(seed: int, stream_N: NDArray[np.int64], position_N: NDArray[np.int64], num: int) -> NDArray[np.uint32]:
    """[N, num] random words."""
    stream, position = stream_N.astype(np.uint64), position_N.astype(np.uint64)
    num_blocks = (num + 3) // 4
    counter = np.empty((len(stream), num_blocks, 4), np.uint32)
    high = np.uint64(0xFFFF)
    counter[..., 0] = np.arange(num_blocks, dtype=np.uint32)
    counter[..., 1] = (stream & _MASK).astype(np.uint32)[:, None]
    counter[..., 2] = (position & _MASK).astype(np.uint32)[:, None]
    top = ((stream >> _SHIFT) & high) | (((position >> _SHIFT) & high) << np.uint64(16))
    counter[..., 3] = top.astype(np.uint32)[:, None]
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return words.reshape(len(stream), -1)[:, :num]


def _to_uniform(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    return ((words >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def uniform(seed: int, stream_N: NDArray[np.int64], position_N: NDArray[np.int64], num: int) -> NDArray[np.float32]:
    """[N, num] in (0, 1), multiples of 2^-24."""
    return _to_uniform(bits(seed, stream_N, position_N, num))


def normal(seed: int, stream_N: NDArray[np.int64], position_N: NDArray[np.int64], num: int) -> NDArray[np.float32]:
    """[N, num] standard normals by Box-Muller on neighbouring columns."""
    u = _to_uniform(bits(seed, stream_N, position_N, num + num % 2)).astype(np.float64)
    radius, angle = np.sqrt(-2.0 * np.log(u[:, 0::2])), 2.0 * np.pi * u[:, 1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return pairs.reshape(len(u), -1)[:, :num].astype(np.float32)


def uniform_index(seed: int, stream: int, position: int, num: int, size: int) -> NDArray[np.int64]:
    """[num] draws from 0..size-1."""
    row = uniform(seed, np.array([stream]), np.array([position]), 2 * num)
    high, low = row.reshape(2, num).astype(np.float64)
    index = ((high + (low - 0.5) * 2.0**-23) * size).astype(np.int64)
    return np.minimum(index, size - 1, out=index)
