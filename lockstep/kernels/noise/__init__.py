"""Counter-based noise: a value depends on (seed, stream, position, column) and on nothing else, so that a sample does
not change with the batch, the step or the worker that draws it.

Streams and positions count modulo 2^48, columns up to 2^34. Legend: N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.noise import naive

_SEED_MASK = (1 << 64) - 1


def uniform(seed: int, stream_N: Tensor, position_N: Tensor, num: int, out: Tensor | None = None) -> Tensor:
    """Uniforms [N, num] in the open interval (0, 1), float32, 23 bits each.

    Args:
        seed: taken modulo 2^64.
        stream_N, position_N: int64, e.g. the environment and its step.
        out: float32 [N, num] to fill instead of a new tensor.
    """
    return _fill("uniform", seed, stream_N, position_N, num, out)


def normal(seed: int, stream_N: Tensor, position_N: Tensor, num: int, out: Tensor | None = None) -> Tensor:
    """Standard normals [N, num], float32, by Box-Muller; arguments as in `uniform`."""
    return _fill("normal", seed, stream_N, position_N, num, out)


def noise_bits(seed: int, stream_N: Tensor, position_N: Tensor, num: int) -> Tensor:
    """The random words behind `uniform`, [N, num] int64 in 0..2^32-1."""
    _check(stream_N, position_N)
    return torch.from_numpy(naive.bits(seed, stream_N.numpy(), position_N.numpy(), num).astype("int64"))


def uniform_index(seed: int, stream: int, position: int, num: int, size: int) -> Tensor:
    """`num` draws from 0..size-1, with replacement: int64 [num], a function of the arguments alone.

    A uniform has 23 bits, too few for a million values: a second one fills the gaps.

    Raises:
        InputError: size below 1.
    """
    if size < 1:
        raise InputError(f"size={size}; expected at least 1 value to draw from", field="size")
    if not native.usable():
        return torch.from_numpy(naive.uniform_index(seed, stream, position, num, size))
    out = torch.empty(num, dtype=torch.int64)
    native.lib().ls_uniform_index(seed & _SEED_MASK, stream, position, size, out.data_ptr(), num)
    return out


def _check(stream_N: Tensor, position_N: Tensor) -> None:
    for name, tensor in (("stream", stream_N), ("position", position_N)):
        if tensor.dtype is not torch.int64 or tensor.dim() != 1 or tensor.shape != stream_N.shape:
            raise InputError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected int64 [N]", field=name)


def _fill(kind: str, seed: int, stream_N: Tensor, position_N: Tensor, num: int, out: Tensor | None) -> Tensor:
    _check(stream_N, position_N)
    shape = (stream_N.shape[0], num)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32)
    elif tuple(out.shape) != shape or out.dtype is not torch.float32 or not out.is_contiguous():
        raise InputError(f"out is {out.dtype} {tuple(out.shape)}; expected contiguous float32 {shape}", field="out")
    if not (out.is_cpu and native.usable()):
        function = naive.uniform if kind == "uniform" else naive.normal
        out.copy_(torch.from_numpy(function(seed, stream_N.cpu().numpy(), position_N.cpu().numpy(), num)))
        return out
    streams, positions = native.contiguous(stream_N), native.contiguous(position_N)
    function = native.lib().ls_uniform if kind == "uniform" else native.lib().ls_normal
    function(seed & _SEED_MASK, streams.data_ptr(), positions.data_ptr(), out.data_ptr(), *shape)
    return out
