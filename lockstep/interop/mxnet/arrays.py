"""MXNet operators that move, cut, join and make arrays, without arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.core.errors import InputError, unknown_name
from lockstep.interop.mxnet.reader import Node

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Maker = Callable[[Node], Function]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int8": torch.int8,
    "int64": torch.int64,
    "bool": torch.bool,
}


def _dtype(node: Node, default: str = "float32") -> torch.dtype:
    name = node.string("dtype", default)
    name = default if name in ("None", "-1", "") else name
    if name not in DTYPES:
        raise node.fail(unknown_name("dtype", name, DTYPES))
    return DTYPES[name]


def _reshape(node: Node) -> Function:
    codes, reverse = [int(code or 0) for code in node.integers("shape")], node.flag("reverse", False)
    if not codes:
        target, keeps = [int(dim or 0) for dim in node.integers("target_shape")], node.flag("keep_highest", False)
        codes = [0 if keeps and index == 0 else dim or -1 for index, dim in enumerate(target)]
    if not codes:
        raise node.fail("has neither shape nor target_shape")
    return lambda x: x.reshape(reshape_codes(tuple(x.shape), codes, reverse))


def reshape_codes(shape: tuple[int, ...], codes: Sequence[int], reverse: bool = False) -> list[int]:
    """The shape that MXNet's codes stand for: 0 copies, -1 is inferred, -2 copies the rest, -3 merges two, -4 splits one.

    >>> reshape_codes((2, 3, 4), [-3, 0]), reshape_codes((2, 3, 4), [-4, 1, 2, -2]), reshape_codes((8, 3), [-1, 0], True)
    ([6, 4], [1, 2, 3, 4], [-1, 3])
    """
    if reverse:
        shape, codes = shape[::-1], codes[::-1]
    out: list[int] = []
    at, index = 0, 0
    try:
        while index < len(codes):
            code = codes[index]
            if code > 0 or code == -1:
                out.append(code)
                at += 1
            elif code == 0:
                out.append(shape[at])
                at += 1
            elif code == -2:
                out += shape[at:]
                at = len(shape)
            elif code == -3:
                out.append(shape[at] * shape[at + 1])
                at += 2
            elif code == -4:
                first, second = codes[index + 1], codes[index + 2]
                first = shape[at] // second if first == -1 else first
                out += [first, shape[at] // first if second == -1 else second]
                at += 1
                index += 2
            else:
                raise InputError(f"reshape code {code} is unknown", field="shape")
            index += 1
    except (IndexError, ZeroDivisionError) as error:
        raise InputError(f"reshape codes {list(codes)} do not fit shape {shape}", field="shape") from error
    return out[::-1] if reverse else out


def _concat(node: Node) -> Function:
    axis = node.integer("dim", node.integer("axis", 1))
    node.integer("num_args", 0)
    return lambda *parts: torch.cat(parts, axis)


def _stack(node: Node) -> Function:
    axis = node.integer("axis", 0)
    node.integer("num_args", 0)
    return lambda *parts: torch.stack(parts, axis)


def _split(node: Node) -> Function:
    num, axis = node.integer("num_outputs", 1), node.integer("axis", 1)
    squeezes = node.flag("squeeze_axis", False)
    if num < 1:
        raise node.fail(f"num_outputs={num} must be at least 1")

    def split(x: Tensor) -> tuple[Tensor, ...]:
        if x.shape[axis] % num:
            raise InputError(
                f"{node.name}: axis {axis} of {tuple(x.shape)} does not divide into {num}", field=node.name
            )
        parts = x.split(x.shape[axis] // num, axis)
        return tuple(part.squeeze(axis) for part in parts) if squeezes else parts

    return split


def _slice_axis(node: Node) -> Function:
    axis, begin = node.integer("axis", 0), node.integer("begin", 0)
    end = node.integer("end", 0) if node.has("end") else None

    def cut(x: Tensor) -> Tensor:
        start, stop, _ = slice(begin, end).indices(x.shape[axis])
        return x.narrow(axis, start, max(stop - start, 0))

    return cut


def _slice(node: Node) -> Function:
    begin, end, step = node.integers("begin"), node.integers("end"), node.integers("step")
    if any((value or 1) < 1 for value in step):
        raise node.fail(f"step={step}: negative steps are not supported")
    steps = step or (None,) * len(begin)
    slices = tuple(slice(*item) for item in zip(begin, end, steps, strict=False))
    return lambda x: x[slices]


def _slice_like(node: Node) -> Function:
    axes = node.integers("axes")

    def cut(x: Tensor, like: Tensor) -> Tensor:
        for axis in axes or range(x.ndim):
            x = x.narrow(axis, 0, like.shape[axis])
        return x

    return cut


def _transpose(node: Node) -> Function:
    axes = node.integers("axes")
    return lambda x: x.permute(axes or tuple(range(x.ndim))[::-1])


def axes_of(node: Node, name: str = "axis") -> tuple[int, ...] | None:
    values = node.integers(name)
    return tuple(int(value) for value in values) if node.has(name) and values else None


def _fill(value: float | None) -> Maker:
    def make(node: Node) -> Function:
        # A dimension of 0 is one that MXNet infers from its use; here one entry stands for all of them.
        shape = tuple(max(int(dim or 0), 1) for dim in node.integers("shape"))
        dtype, number = _dtype(node), node.real("value", 0.0) if value is None else value
        if math.prod(shape) > 1 << 28:
            raise node.fail(f"makes a constant of shape {shape}")
        node.string("ctx", "")
        return lambda: torch.full(shape, number, dtype=dtype)

    return make


def _arange(node: Node) -> Function:
    start, stop, step = node.real("start", 0.0), node.real("stop", 0.0), node.real("step", 1.0)
    repeat, dtype = node.integer("repeat", 1), _dtype(node)
    if not node.has("stop"):
        start, stop = 0.0, start
    for name in ("ctx", "infer_range"):
        node.string(name, "")
    if step == 0 or not 0 <= (stop - start) / step * max(repeat, 1) < 1 << 24:
        raise node.fail(f"range from {start} to {stop} by {step}, {repeat} times each")
    return lambda: torch.arange(start, stop, step).repeat_interleave(repeat).to(dtype)


def _take(node: Node) -> Function:
    axis, mode = node.integer("axis", 0), node.string("mode", "clip")
    if mode == "raise":
        mode = "clip"

    def take(x: Tensor, indices: Tensor) -> Tensor:
        size = x.shape[axis]
        picked = indices.long() % size if mode == "wrap" else indices.long().clamp(0, size - 1)
        out = x.index_select(axis, picked.reshape(-1))
        dim = axis % x.ndim
        return out.reshape(*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])

    return take


def _pick(node: Node) -> Function:
    axis, keeps = node.integer("axis", -1), node.flag("keepdims", False)
    node.string("mode", "clip")

    def pick(x: Tensor, indices: Tensor) -> Tensor:
        index = indices.long().clamp(0, x.shape[axis] - 1)
        index = index if index.ndim == x.ndim else index.unsqueeze(axis)
        out = x.gather(axis, index)
        return out if keeps else out.squeeze(axis)

    return pick


def _one_hot(node: Node) -> Function:
    depth, on, off = node.integer("depth", 0), node.real("on_value", 1.0), node.real("off_value", 0.0)
    dtype = _dtype(node)
    if not 0 < depth < 1 << 24:
        raise node.fail(f"depth={depth}")

    def one_hot(indices: Tensor) -> Tensor:
        hit = indices.long()[..., None] == torch.arange(depth, device=indices.device)
        return torch.where(hit, on, off).to(dtype)

    return one_hot


def _pad(node: Node) -> Function:
    widths = [int(width or 0) for width in node.integers("pad_width")]
    mode, value = node.string("mode", "constant"), node.real("constant_value", 0.0)
    modes = {"constant": "constant", "edge": "replicate", "reflect": "reflect"}
    if mode not in modes or len(widths) % 2 or any(not 0 <= width < 1 << 16 for width in widths):
        raise node.fail(f"mode={mode!r}, pad_width={widths}")
    edges = [width for start in range(len(widths) - 2, -1, -2) for width in widths[start : start + 2]]
    if mode == "constant":
        return lambda x: F.pad(x, edges, value=value)
    # The library pads by repetition only behind batch and channel.
    return lambda x: F.pad(x, edges[: 2 * (x.ndim - 2)], mode=modes[mode])


def _up_sampling(node: Node) -> Function:
    scale, kind = node.integer("scale", 1), node.string("sample_type", "nearest")
    for name in ("num_args", "num_filter", "multi_input_mode", "workspace"):
        node.string(name, "")
    if kind != "nearest" or len(node.inputs) != 1 or not 1 <= scale <= 256:
        raise node.fail(
            f"sample_type={kind!r}, scale={scale}, {len(node.inputs)} inputs; nearest of one input is supported"
        )
    return lambda x: x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def _crop(node: Node) -> Function:
    offset, size = node.integers("offset", (0, 0)), node.integers("h_w", (0, 0))
    centres = node.flag("center_crop", False)
    node.integer("num_args", 1)

    def crop(x: Tensor, *like: Tensor) -> Tensor:
        height, width = like[0].shape[-2:] if like else size
        top, left = offset
        if centres:
            top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
        return x[..., top : top + height, left : left + width]

    return crop


def _broadcast_axis(node: Node) -> Function:
    axes, sizes = node.integers("axis"), node.integers("size")

    def broadcast(x: Tensor) -> Tensor:
        shape = list(x.shape)
        for axis, size in zip(axes, sizes, strict=True):
            shape[axis] = size
        return x.expand(shape)

    return broadcast


def _broadcast_to(node: Node) -> Function:
    shape = node.integers("shape")
    return lambda x: x.expand([old if dim == 0 else dim for old, dim in zip(x.shape, shape, strict=True)])


def _sequence(kind: str) -> Maker:
    def make(node: Node) -> Function:
        uses_length, axis = node.flag("use_sequence_length", False), node.integer("axis", 0)
        value = node.real("value", 0.0)
        if axis not in (0, 1) or (kind == "reverse" and axis != 0):
            raise node.fail(f"axis={axis}")

        def apply(x: Tensor, *length: Tensor) -> Tensor:
            steps = x if axis == 0 else x.transpose(0, 1)
            num = steps.shape[0]
            if not uses_length:
                return steps[-1] if kind == "last" else steps.flip(0) if kind == "reverse" else x
            lengths = length[0].long()
            if kind == "last":
                return steps[lengths - 1, torch.arange(steps.shape[1], device=x.device)]
            time = torch.arange(num, device=x.device)[:, None]
            if kind == "reverse":
                index = torch.where(time < lengths, lengths - 1 - time, time)
                return steps[index, torch.arange(steps.shape[1], device=x.device)]
            mask = (time < lengths).reshape(num, -1, *(1,) * (x.ndim - 2))
            out = steps.masked_fill(~mask, value)
            return out if axis == 0 else out.transpose(0, 1)

        return apply

    return make


def _swap_axes(node: Node) -> Function:
    first, second = node.integer("dim1", 0), node.integer("dim2", 0)
    return lambda x: x.transpose(first, second)


def _expand_dims(node: Node) -> Function:
    axis = node.integer("axis", 0)
    return lambda x: x.unsqueeze(axis)


def _squeeze(node: Node) -> Function:
    axes = axes_of(node)
    return lambda x: x.squeeze() if axes is None else x.squeeze(axes)


def _tile(node: Node) -> Function:
    reps = node.integers("reps")
    return lambda x: x.tile(reps)


def _repeat(node: Node) -> Function:
    repeats, axis = node.integer("repeats", 1), node.integer("axis", 0) if node.has("axis") else None
    return lambda x: x.repeat_interleave(repeats, axis)


def _flip(node: Node) -> Function:
    axes = axes_of(node) or ()
    return lambda x: x.flip(axes)


def _cast(node: Node) -> Function:
    dtype = _dtype(node)
    return lambda x: x.to(dtype)


ARRAY_OPS: dict[str, Maker] = {
    **dict.fromkeys(("Concat", "concat", "_rnn_param_concat"), _concat),
    **dict.fromkeys(("SliceChannel", "split"), _split),
    **dict.fromkeys(("Reshape", "reshape"), _reshape),
    **dict.fromkeys(("Cast", "cast", "amp_cast"), _cast),
    **dict.fromkeys(("Pad", "pad"), _pad),
    **dict.fromkeys(("SwapAxis", "swapaxes"), _swap_axes),
    **dict.fromkeys(("reverse", "flip"), _flip),
    **dict.fromkeys(("broadcast_axis", "broadcast_axes"), _broadcast_axis),
    "Crop": _crop,
    "SequenceLast": _sequence("last"),
    "SequenceMask": _sequence("mask"),
    "SequenceReverse": _sequence("reverse"),
    "UpSampling": _up_sampling,
    "_arange": _arange,
    "_full": _fill(None),
    "_ones": _fill(1.0),
    "_zeros": _fill(0.0),
    "broadcast_to": _broadcast_to,
    "expand_dims": _expand_dims,
    "one_hot": _one_hot,
    "pick": _pick,
    "repeat": _repeat,
    "slice": _slice,
    "crop": _slice,
    "slice_axis": _slice_axis,
    "slice_like": _slice_like,
    "squeeze": _squeeze,
    "stack": _stack,
    "take": _take,
    "tile": _tile,
    "transpose": _transpose,
}
"""The operator's name -> what makes its function."""
