"""Fourier transforms and windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.models.graph.call import Call
from lockstep.models.graph.limits import check_size
from lockstep.models.graph.ops.cast import DTYPES
from lockstep.models.graph.values import Value, to_scalar, to_tensor

Function = Callable[..., Any]


def dft(call: Call, x: Value, length: Value = None, axis: Value = None) -> Tensor:
    x = to_tensor(x)
    inverse, onesided = bool(call.get("inverse", 0)), bool(call.get("onesided", 0))
    dim = call.get("axis", 1) if axis is None and call.version < 20 else (-2 if axis is None else int(to_scalar(axis)))
    dim = dim % x.ndim
    num = None if length is None else int(to_scalar(length))
    signal = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)
    if inverse and onesided:
        return torch.fft.irfft(signal, n=num, dim=dim).unsqueeze(-1)
    fn = torch.fft.ifft if inverse else torch.fft.fft
    out = torch.view_as_real(fn(signal, n=num, dim=dim))
    return out.narrow(dim, 0, out.shape[dim] // 2 + 1) if onesided else out


def stft(call: Call, x: Value, step: Value, window: Value = None, length: Value = None) -> Tensor:
    x = to_tensor(x)
    hop = int(to_scalar(step))
    shape = None if window is None else to_tensor(window)
    size = int(to_scalar(length)) if length is not None else len(shape)  # type: ignore[arg-type]
    signal = torch.view_as_complex(x.contiguous()) if x.ndim == 3 and x.shape[-1] == 2 else x.reshape(*x.shape[:2])
    frames = signal.unfold(1, size, hop)
    frames = frames if shape is None else frames * shape
    out = torch.view_as_real(torch.fft.fft(frames, dim=2))
    return out[:, :, : size // 2 + 1] if call.get("onesided", 1) else out


def window(weights: Callable[[Tensor], Tensor]) -> Function:
    """A window over `size` steps; `weights` sees the angle 2 pi n / N."""

    def run(call: Call, size: Value) -> Tensor:
        num = int(to_scalar(size))
        check_size([num])
        period = num if call.get("periodic", 1) else num - 1
        angle = 2 * math.pi * torch.arange(num, dtype=torch.float64) / period
        return weights(angle).to(DTYPES[call.get("output_datatype", 1)])

    return run


def mel_weights(call: Call, num_mel: Value, length: Value, rate: Value, low: Value, high: Value) -> Tensor:
    """Triangles on the mel scale over the bins of a spectrum."""
    bins, size, hertz = int(to_scalar(num_mel)), int(to_scalar(length)), float(to_scalar(rate))
    first, last = (2595 * math.log10(1 + float(to_scalar(x)) / 700) for x in (low, high))
    check_size([size // 2 + 1, bins])
    mel = first + torch.arange(bins + 2, dtype=torch.float64) * ((last - first) / (bins + 2))
    edges = torch.floor((size + 1) * (700 * (10 ** (mel / 2595) - 1)) / hertz).to(torch.int64).tolist()
    out = torch.zeros(size // 2 + 1, bins, dtype=torch.float64)
    for i in range(bins):
        left, middle, right = edges[i : i + 3]
        if middle == left:
            out[middle, i] = 1
        else:
            for j in range(left, middle + 1):
                out[j, i] = (j - left) / (middle - left)
        for j in range(middle, right):
            out[j, i] = (right - j) / (right - middle)
    return out.to(DTYPES[call.get("output_datatype", 1)])


OPS: dict[str, Function] = {
    "BlackmanWindow": window(lambda a: 0.42 - 0.5 * torch.cos(a) + 0.08 * torch.cos(2 * a)),
    "DFT": dft,
    "HammingWindow": window(lambda a: 25 / 46 - 21 / 46 * torch.cos(a)),
    "HannWindow": window(lambda a: 0.5 - 0.5 * torch.cos(a)),
    "MelWeightMatrix": mel_weights,
    "STFT": stft,
}
