"""Caffe's fillers: how weights start when there is no file of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lockstep.interop.caffe.schema import FILLER_FIELDS
from lockstep.interop.caffe.text import Message

MAX_FILLED = 1 << 28
"""Elements of one blob made from nothing: a description is a few bytes and must not cost gigabytes."""


def fill(message: Message, shape: tuple[int, ...], generator: torch.Generator, default: float = 0.0) -> Tensor:
    """Values as a `*_filler` describes them (the constant `default` if it says nothing).

    Raises:
        FormatError: an unknown filler or setting, or a blob of more than `MAX_FILLED` elements.
    """
    message.known(FILLER_FIELDS)
    count = math.prod(shape)
    if count > MAX_FILLED:
        raise message.fail(f"a blob of shape {shape} is larger than {MAX_FILLED} elements")
    if message.integer("sparse", -1) >= 0:
        raise message.fail("sparse filling is not supported")
    kind = message.string("type", "constant")
    values = torch.empty(shape)
    if kind == "constant":
        return values.fill_(message.real("value", 0.0 if message.fields else default))
    if kind == "gaussian":
        return values.normal_(message.real("mean", 0.0), abs(message.real("std", 1.0)), generator=generator)
    if kind == "uniform":
        low, high = message.real("min", 0.0), message.real("max", 1.0)
        if not low <= high:
            raise message.fail(f"min={low} lies above max={high}")
        return values.uniform_(low, high, generator=generator)
    if kind in ("xavier", "msra"):
        fan = max(_fan(message, shape), 1.0)
        if kind == "msra":
            return values.normal_(0.0, math.sqrt(2 / fan), generator=generator)
        bound = math.sqrt(3 / fan)
        return values.uniform_(-bound, bound, generator=generator)
    if kind == "positive_unitball":
        rows = values.uniform_(0.0, 1.0, generator=generator).flatten(1)
        return (rows / rows.sum(1, keepdim=True)).reshape(shape)
    if kind == "bilinear":
        return _bilinear(message, shape)
    raise message.fail(f"unknown filler {kind!r}")


def _fan(message: Message, shape: tuple[int, ...]) -> float:
    count = math.prod(shape)
    fan_in = count / max(shape[0], 1)
    fan_out = count / max(shape[1], 1) if len(shape) > 1 else count
    norm = message.enum("variance_norm", ("FAN_IN", "FAN_OUT", "AVERAGE"), "FAN_IN")
    return {"FAN_IN": fan_in, "FAN_OUT": fan_out, "AVERAGE": (fan_in + fan_out) / 2}[norm]


def _bilinear(message: Message, shape: tuple[int, ...]) -> Tensor:
    if len(shape) != 4 or shape[2] != shape[3]:
        raise message.fail(f"bilinear filling of a blob of shape {shape}; square kernels only")
    half = math.ceil(shape[3] / 2)
    centre = (shape[3] - 1) / (2 * half)
    line = 1 - (torch.arange(shape[3]) / half - centre).abs()
    return (line[:, None] * line).expand(shape).contiguous()
