"""Losses, determinants and sums of products.

Legend: N rows, C classes, S further axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.models.graph.call import Call
from lockstep.models.graph.values import Value, to_tensor, to_tensors

Function = Callable[..., Any]


def negative_log_likelihood(call: Call, x: Value, target: Value, weight: Value = None) -> Tensor:
    x, target, weight = to_tensors((x, target, weight))
    ignored = call.get("ignore_index", None)
    target = target.to(torch.int64)
    seen = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
    safe = torch.where(seen, target, torch.zeros_like(target))
    loss = -x.gather(1, safe.unsqueeze(1)).squeeze(1)
    factor = torch.ones_like(loss) if weight is None else weight[safe]
    factor = torch.where(seen, factor, torch.zeros_like(factor))
    loss = loss * factor
    match call.get("reduction", "mean"):
        case "none":
            return loss
        case "sum":
            return loss.sum()
    return loss.sum() / factor.sum()


def softmax_cross_entropy(call: Call, x: Value, target: Value, weight: Value = None) -> Any:
    logprob = torch.log_softmax(to_tensor(x), dim=1)
    return negative_log_likelihood(call, logprob, target, weight), logprob


def det(call: Call, x: Value) -> Tensor:
    return torch.linalg.det(to_tensor(x))


def einsum(call: Call, *xs: Value) -> Tensor:
    return torch.einsum(call.need("equation").replace(" ", ""), *to_tensors(xs))


OPS: dict[str, Function] = {
    "Det": det,
    "Einsum": einsum,
    "NegativeLogLikelihoodLoss": negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": softmax_cross_entropy,
}
