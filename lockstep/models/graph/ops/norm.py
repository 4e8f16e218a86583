"""Normalisations.

Legend: N rows, C channels, S spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.models.graph.call import Call
from lockstep.models.graph.ops.cast import DTYPES
from lockstep.models.graph.values import Value, to_tensor, to_tensors

Function = Callable[..., Any]


def per_channel(x: Tensor, rank: int) -> Tensor:
    """[C] -> [C, 1, ...] beside [N, C, S...]."""
    return x.reshape(-1, *(1,) * (rank - 2))


def batch_norm(call: Call, x: Value, scale: Value, bias: Value, mean: Value, var: Value) -> Any:
    x, scale, bias, mean, var = to_tensors((x, scale, bias, mean, var))
    eps = call.get("epsilon", 1e-5)
    if call.get("training_mode", 0) or (call.version < 7 and not call.get("is_test", 0)):
        return _batch_norm_training(call, x, scale, bias, mean, var)
    rank = max(x.ndim, 2)
    inverse = torch.rsqrt(var.to(torch.float32 if var.dtype != torch.float64 else torch.float64) + eps)
    factor = scale * inverse
    out = x * per_channel(factor, rank) + per_channel(bias - mean * factor, rank)
    return out.to(x.dtype)


def _batch_norm_training(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
    """Statistics of the batch; the new running ones are outputs of the graph."""
    eps, momentum = call.get("epsilon", 1e-5), call.get("momentum", 0.9)
    dims = (0, *range(2, x.ndim))
    batch_mean, batch_var = x.mean(dims), x.var(dims, unbiased=False)
    normal = (x - per_channel(batch_mean, x.ndim)) * torch.rsqrt(per_channel(batch_var, x.ndim) + eps)
    out = normal * per_channel(scale, x.ndim) + per_channel(bias, x.ndim)
    return (
        out.to(x.dtype),
        mean * momentum + batch_mean * (1 - momentum),
        var * momentum + batch_var * (1 - momentum),
    )


def instance_norm(call: Call, x: Value, scale: Value, bias: Value) -> Tensor:
    x, scale, bias = to_tensors((x, scale, bias))
    dims = tuple(range(2, x.ndim))
    var, mean = torch.var_mean(x, dims, unbiased=False, keepdim=True)
    normal = (x - mean) * torch.rsqrt(var + call.get("epsilon", 1e-5))
    return normal * per_channel(scale, x.ndim) + per_channel(bias, x.ndim)


def group_norm(call: Call, x: Value, scale: Value, bias: Value) -> Tensor:
    x, scale, bias = to_tensors((x, scale, bias))
    groups = call.need("num_groups")
    stash = DTYPES[call.get("stash_type", 1)]
    grouped = x.to(stash).reshape(x.shape[0], groups, -1)
    var, mean = torch.var_mean(grouped, -1, unbiased=False, keepdim=True)
    normal = ((grouped - mean) * torch.rsqrt(var + call.get("epsilon", 1e-5))).to(x.dtype)
    if call.version < 21 and scale.shape[0] == groups:
        # Opset 18 has one scale for each group.
        return (normal * scale.unsqueeze(-1) + bias.unsqueeze(-1)).reshape(x.shape)
    return normal.reshape(x.shape) * per_channel(scale, x.ndim) + per_channel(bias, x.ndim)


def layer_norm(call: Call, x: Value, scale: Value, bias: Value = None) -> Any:
    x, scale, bias = to_tensors((x, scale, bias))
    axis = call.get("axis", -1)
    axis = axis + x.ndim if axis < 0 else axis
    dims = tuple(range(axis, x.ndim))
    wide = x.to(DTYPES[call.get("stash_type", 1)]) if x.dtype != torch.float64 else x
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    inverse = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + call.get("epsilon", 1e-5))
    out = (centred * inverse).to(x.dtype) * scale
    return (out if bias is None else out + bias), mean, inverse


def rms_norm(call: Call, x: Value, scale: Value) -> Tensor:
    x, scale = to_tensors((x, scale))
    axis = call.get("axis", -1)
    axis = axis + x.ndim if axis < 0 else axis
    dims = tuple(range(axis, x.ndim))
    wide = x.to(DTYPES[call.get("stash_type", 1)]) if x.dtype != torch.float64 else x
    inverse = torch.rsqrt((wide * wide).mean(dims, keepdim=True) + call.get("epsilon", 1e-5))
    return (wide * inverse).to(x.dtype) * scale


def lp_norm(call: Call, x: Value) -> Tensor:
    x, axis, p = to_tensor(x), call.get("axis", -1), call.get("p", 2)
    size = x.abs().sum(axis, keepdim=True) if p == 1 else (x * x).sum(axis, keepdim=True).sqrt()
    return torch.where(size == 0, torch.zeros_like(x), x / torch.where(size == 0, torch.ones_like(size), size))


def local_response_norm(call: Call, x: Value) -> Tensor:
    """Krizhevsky et al. 2012; ONNX divides alpha by the size."""
    x, size = to_tensor(x), call.need("size")
    alpha, beta, bias = call.get("alpha", 1e-4), call.get("beta", 0.75), call.get("bias", 1.0)
    square = (x * x).reshape(x.shape[0], 1, x.shape[1], -1)
    low = (size - 1) // 2
    square = F.pad(square, (0, 0, low, size - 1 - low))
    total = square.unfold(2, size, 1).sum(-1).reshape(x.shape)
    return x / (bias + alpha / size * total).pow(beta)


def mean_variance_norm(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    dims = call.get("axes", (0, 2, 3))
    mean = x.mean(dims, keepdim=True)
    deviation = ((x * x).mean(dims, keepdim=True) - mean * mean).clamp(min=0.0).sqrt()
    return (x - mean) / (deviation + 1e-9)


OPS: dict[str, Function] = {
    "BatchNormalization": batch_norm,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LRN": local_response_norm,
    "LayerNormalization": layer_norm,
    "LpNormalization": lp_norm,
    "MeanVarianceNormalization": mean_variance_norm,
    "RMSNormalization": rms_norm,
}
