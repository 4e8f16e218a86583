"""Which stored tensors are weights.

Every floating-point tensor of rank 1 or more that a graph consumes is one, except statistics of a normalisation and what
is a constant by its place: bounds, exponents, padding values, sizes, quantisation steps.
"""

from __future__ import annotations

from collections.abc import Iterable

ANY = -2
"""Every input of the operation."""

CONSTANT_PLACES: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (3, 4),
    "SpatialBN": (3, 4),
    "Clip": (1, 2),
    "Pad": (2,),
    "Pow": (1,),
    "Resize": (1, 2),
    "Upsample": (1,),
    "Dropout": (1,),
    "Range": (ANY,),
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (1, 4, 6),
    "QLinearMatMul": (1, 4, 6),
    "NonMaxSuppression": (3, 4),
    "OneHot": (2,),
    "STFT": (2,),
    "MelWeightMatrix": (ANY,),
    "ConstantFill": (ANY,),
    "RoiAlign": (1,),
}
"""Operation -> indices of inputs that are constants."""


def is_weight(rank: int, uses: Iterable[tuple[str, int]]) -> bool:
    """Whether a floating-point tensor is trained.

    Args:
        uses: (operation, input index) of everything that reads it.

    >>> is_weight(2, [("MatMul", 1)]), is_weight(1, [("BatchNormalization", 3)]), is_weight(0, [("Mul", 1)])
    (True, False, False)
    """
    return rank >= 1 and not all(_is_constant_place(op, index) for op, index in uses)


def _is_constant_place(op: str, index: int) -> bool:
    places = CONSTANT_PLACES.get(op, ())
    return ANY in places or index in places
