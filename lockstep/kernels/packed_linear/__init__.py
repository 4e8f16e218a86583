"""Products with large matrices that are laid out once and read often: every linear of a language model.

Each output element is reduced over its inputs in one fixed order, whatever the number of rows, their split into calls
and the number of threads, when training as when serving.

Legend: M rows, N outputs, K inputs, X experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels import native
from lockstep.kernels.gpu import Later
from lockstep.kernels.packed_linear import cpu, naive
from lockstep.kernels.packed_linear.blocks import pack_blocks
from lockstep.kernels.packed_linear.packing import pack, pack_planes, stack, unpack, unpack_some
from lockstep.kernels.packed_linear.trained import TrainedGrouped, TrainedLinear
from lockstep.kernels.packed_linear.weight import FORMATS, PackedWeight

__all__ = [
    "FORMATS",
    "PackedWeight",
    "grouped_linear",
    "pack",
    "pack_blocks",
    "pack_planes",
    "packed_linear",
    "stack",
    "trained_grouped_linear",
    "trained_linear",
    "unpack",
    "unpack_some",
]


_TRITON = Later("lockstep.kernels.packed_linear.triton")


def packed_linear(x_MK: Tensor, packed: PackedWeight, bias_N: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, without gradients.

    fp32: a chain of fused multiply-adds over rising k that starts at the bias. bf16: the row is rounded to bf16 (nearest
    even) and the chain runs over pairs of inputs, with sums in float32. Quantised: the row is rounded to integers of
    -127..127 with one scale per 32 inputs (largest magnitude / 127), a block's products are summed as integers, and
    acc = fma(sum, weight scale * row scale, acc), then fma(minimum, row scale * sum of the row's integers, acc), over
    rising blocks of 16 or 32 inputs. There a NaN or an infinity in a row makes all outputs of the row NaN.

    Args:
        x_MK: float32, contiguous or not. M may be 0.
        packed: a single matrix, on x's device.
        bias_N: float32.

    Returns:
        float32 [M, N]. A row's bits depend on that row only.

    Raises:
        InputError: shapes, dtypes or devices that do not fit; a stack, which is for `grouped_linear`.
    """
    _check(x_MK, packed, bias_N)
    return _product(x_MK, packed, bias_N)


def trained_linear(
    x_MK: Tensor, weight_NK: Tensor | None, packed: PackedWeight, bias_N: Tensor | None = None
) -> Tensor:
    """`packed_linear`, bit for bit, with gradients for x, weight and bias.

    Args:
        weight_NK: the matrix that `packed` was made from, float32 or bfloat16; the caller packs again when it changes.
            None with a matrix that is not trained: x's gradient then takes the packed one.

    Returns:
        float32 [M, N]. The gradient's products run in float32, or in bf16 for the format bf16.

    Raises:
        ConfigError: the weight of a quantised format wants a gradient, which integers have not.
        InputError: as `packed_linear`.
    """
    _check(x_MK, packed, bias_N)
    _check_trained(weight_NK, packed, (packed.num_outputs, packed.num_inputs))
    out: Tensor = TrainedLinear.apply(x_MK, weight_NK, bias_N, packed, _product)  # type: ignore[no-untyped-call]
    return out


def grouped_linear(
    x_MK: Tensor,
    packed: PackedWeight | Sequence[PackedWeight],
    starts_X1: Tensor,
    bias_XN: Tensor | None = None,
) -> Tensor:
    """Rows starts[x] .. starts[x + 1] times expert x: `packed_linear` of each, bit for bit, in one call.

    Args:
        packed: a stack, or matrices of one layout (format, shape, group).
        starts_X1: int64 on the CPU, rising from 0 to M; an expert may have no rows.

    Returns:
        float32 [M, N].

    Raises:
        InputError: as `packed_linear`; starts that do not rise from 0 to M; experts of different layouts.
    """
    first = _check_grouped(x_MK, packed, starts_X1, bias_XN)
    return _grouped_product(x_MK, packed, first, starts_X1, bias_XN)


def trained_grouped_linear(
    x_MK: Tensor,
    weight_XNK: Tensor | None,
    packed: PackedWeight | Sequence[PackedWeight],
    starts_X1: Tensor,
    bias_XN: Tensor | None = None,
) -> Tensor:
    """`grouped_linear`, bit for bit, with gradients as `trained_linear` has them.

    Args:
        weight_XNK: what `packed` was made from, or None.

    Raises:
        ConfigError, InputError: as `trained_linear` and `grouped_linear`.
    """
    first = _check_grouped(x_MK, packed, starts_X1, bias_XN)
    experts = _experts(packed)
    _check_trained(weight_XNK, first, (len(experts), first.num_outputs, first.num_inputs))
    arguments = (experts, starts_X1.tolist(), lambda x, b: _grouped_product(x, packed, first, starts_X1, b))
    out: Tensor = TrainedGrouped.apply(x_MK, weight_XNK, bias_XN, *arguments)  # type: ignore[no-untyped-call]
    return out


def _product(x_MK: Tensor, packed: PackedWeight, bias_N: Tensor | None) -> Tensor:
    chosen = native.choose(x_MK, has_triton=True)
    if chosen == "cpu":
        return cpu.packed_linear(x_MK, packed, bias_N)
    with torch.no_grad():
        if chosen == "triton":
            product: Tensor = _TRITON.packed_linear(x_MK, packed, bias_N)
            return product
        return naive.packed_linear(x_MK, packed, bias_N)


def _grouped_product(
    x_MK: Tensor,
    packed: PackedWeight | Sequence[PackedWeight],
    first: PackedWeight,
    starts_X1: Tensor,
    bias_XN: Tensor | None,
) -> Tensor:
    chosen = native.choose(x_MK, has_triton=True)
    if chosen == "cpu":
        return cpu.grouped_linear(x_MK, packed, starts_X1, bias_XN)
    with torch.no_grad():
        if chosen == "triton":
            product: Tensor = _TRITON.grouped_linear(x_MK, _experts(packed), starts_X1.tolist(), bias_XN)
            return product
        return naive.grouped_linear(x_MK, _experts(packed), starts_X1.tolist(), bias_XN)


def _experts(packed: PackedWeight | Sequence[PackedWeight]) -> list[PackedWeight]:
    if isinstance(packed, PackedWeight):
        return [packed.expert(index) for index in range(packed.num_experts or 0)]
    return list(packed)


def _check(x_MK: Tensor, packed: PackedWeight, bias_N: Tensor | None) -> None:
    if packed.num_experts is not None:
        raise InputError(f"packed is a stack of {packed.num_experts}; use grouped_linear", field="packed")
    _check_rows(x_MK, packed)
    if bias_N is not None:
        _check_bias(bias_N, (packed.num_outputs,), x_MK)


def _check_rows(x_MK: Tensor, packed: PackedWeight) -> None:
    if x_MK.dim() != 2 or x_MK.shape[1] != packed.num_inputs or x_MK.dtype != torch.float32:
        raise InputError(
            f"x is {x_MK.dtype} {list(x_MK.shape)}; expected float32 [rows, {packed.num_inputs}]", field="x"
        )
    if x_MK.device != packed.data.device:
        raise InputError(f"x is on {x_MK.device}, the packed matrix on {packed.data.device}; move one", field="x")


def _check_bias(bias: Tensor, shape: tuple[int, ...], x_MK: Tensor) -> None:
    if tuple(bias.shape) != shape or bias.dtype != torch.float32 or bias.device != x_MK.device:
        raise InputError(
            f"bias is {bias.dtype} {list(bias.shape)} on {bias.device}; expected float32 {list(shape)} on {x_MK.device}",
            field="bias",
        )


def _check_trained(weight: Tensor | None, packed: PackedWeight, shape: tuple[int, ...]) -> None:
    if weight is None:
        return
    if tuple(weight.shape) != shape or weight.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(
            f"weight is {weight.dtype} {list(weight.shape)}; expected float32 or bfloat16 {list(shape)}", field="weight"
        )
    if packed.quantised and weight.requires_grad:
        raise ConfigError(
            f"the weight of a {packed.format} matrix wants a gradient; integers have none: freeze it "
            "(weight.requires_grad_(False)) and train an adapter, or pack it as bf16 or fp32"
        )


def _check_grouped(
    x_MK: Tensor, packed: PackedWeight | Sequence[PackedWeight], starts_X1: Tensor, bias_XN: Tensor | None
) -> PackedWeight:
    if isinstance(packed, PackedWeight):
        first, num_experts = packed, packed.num_experts
        if num_experts is None:
            raise InputError("packed is a single matrix; pass a list or a stack", field="packed")
    else:
        if not packed:
            raise InputError("no experts; pass at least one", field="packed")
        first, num_experts = packed[0], len(packed)
        for index, expert in enumerate(packed):
            if expert.num_experts is not None or not first.same_layout(expert):
                raise InputError(f"expert {index} differs from expert 0 in format, shape or group", field="packed")
    _check_rows(x_MK, first)
    if starts_X1.dtype != torch.int64 or not starts_X1.is_cpu or tuple(starts_X1.shape) != (num_experts + 1,):
        raise InputError(
            f"starts is {starts_X1.dtype} {list(starts_X1.shape)} on {starts_X1.device}; expected int64 "
            f"[{num_experts + 1}] on the CPU",
            field="starts",
        )
    starts = starts_X1.tolist()
    if starts[0] != 0 or starts[-1] != x_MK.shape[0] or any(b < a for a, b in pairwise(starts)):
        raise InputError(f"starts is {starts}; expected to rise from 0 to {x_MK.shape[0]} rows", field="starts")
    if bias_XN is not None:
        _check_bias(bias_XN, (num_experts, first.num_outputs), x_MK)
    return first
