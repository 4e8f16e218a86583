"""Operations of classic machine learning (domain ai.onnx.ml) and of training graphs (ai.onnx.preview.training)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.values import Value, to_scalar, to_tensor, to_tensors

Function = Callable[..., Any]


def array_feature_extractor(call: Call, x: Value, index: Value) -> Tensor:
    x, index = to_tensors((x, index))
    out = x[..., index.reshape(-1)]
    return out.reshape(1, -1) if x.ndim == 1 else out


def binarizer(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    return (x > call.get("threshold", 0.0)).to(x.dtype)


def scaler(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    return (x - torch.tensor(call.need("offset"))) * torch.tensor(call.need("scale"))


def label_encoder(call: Call, x: Any) -> Any:
    x = to_tensor(x)
    keys, values = (_table(call, stem) for stem in ("keys", "values"))
    default = _default(call, values)
    table = dict(zip(keys, values, strict=True))
    missing = next((value for key, value in table.items() if key != key), None)
    items = x.reshape(-1).tolist()
    out = [missing if item != item and missing is not None else table.get(item, default) for item in items]
    if isinstance(default, str):
        return np.array(out, dtype=object).reshape(x.shape)
    dtype = torch.int64 if isinstance(default, int) else torch.float32
    tensor = call.get("default_tensor", None) or call.get("values_tensor", None)
    if tensor is not None:
        dtype = torch.__dict__[tensor.dtype]
    return torch.tensor(out, dtype=dtype).reshape(x.shape)


def _table(call: Call, stem: str) -> list[Any]:
    for kind in ("int64s", "strings", "floats"):
        found = call.get(f"{stem}_{kind}", None)
        if found is not None:
            return list(found)
    return list(call.need(f"{stem}_tensor").data)


def _default(call: Call, values: list[Any]) -> Any:
    tensor = call.get("default_tensor", None)
    if tensor is not None:
        return tensor.data[0]
    first = values[0]
    if isinstance(first, str):
        return call.get("default_string", "_Unused")
    return call.get("default_int64", -1) if isinstance(first, int) else call.get("default_float", -0.0)


# Comparison of a tree's node by number: <=, <, >=, >, ==, !=; 6 asks for membership in a set.
COMPARE: list[Callable[[float, float], bool]] = [
    lambda x, y: x <= y,
    lambda x, y: x < y,
    lambda x, y: x >= y,
    lambda x, y: x > y,
    lambda x, y: x == y,
    lambda x, y: x != y,
]
MEMBER = 6


def tree_ensemble(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    modes = call.need("nodes_modes").data
    splits = call.need("nodes_splits").data
    features, roots = call.need("nodes_featureids"), call.need("tree_roots")
    true_ids, false_ids = call.need("nodes_truenodeids"), call.need("nodes_falsenodeids")
    true_leaf, false_leaf = call.need("nodes_trueleafs"), call.need("nodes_falseleafs")
    targets, weights = call.need("leaf_targetids"), call.need("leaf_weights").data
    sets = _sets(call, modes)
    columns: list[list[list[float]]] = []
    for row in x.tolist():
        votes: list[list[float]] = [[] for _ in range(call.need("n_targets"))]
        for root in roots:
            at, leaf = root, False
            for _ in range(len(modes) + 1):
                value = row[features[at]]
                yes = value in sets[at] if modes[at] == MEMBER else COMPARE[modes[at]](value, splits[at])
                leaf, at = (true_leaf[at], true_ids[at]) if yes else (false_leaf[at], false_ids[at])
                if leaf:
                    break
            else:
                raise FormatError("a tree that leads in a circle", op=call.op)
            votes[targets[at]].append(weights[at])
        columns.append(votes)
    how = [np.mean, np.sum, np.min, np.max][call.get("aggregate_function", 1)]
    out = [[float(how(votes)) if votes else 0.0 for votes in row] for row in columns]
    return torch.tensor(out, dtype=x.dtype)


def _sets(call: Call, modes: tuple[int, ...]) -> dict[int, set[float]]:
    values = call.get("membership_values", None)
    if values is None:
        return {}
    groups: list[set[float]] = [set()]
    for value in values.data:
        if value != value:
            groups.append(set())
        else:
            groups[-1].add(value)
    return dict(zip((i for i, mode in enumerate(modes) if mode == MEMBER), groups, strict=False))


def per_tensor(step: Callable[..., tuple[Any, ...]], num: int) -> Function:
    """An optimiser's step over n tensors: inputs (rate, count, n weights, n gradients, n of each state), outputs alike."""

    def run(call: Call, rate: Value, count: Value, *xs: Value) -> tuple[Tensor, ...]:
        tensors = to_tensors(xs)
        n = len(tensors) // num
        groups = [tensors[i * n : (i + 1) * n] for i in range(num)]
        results = [
            step(call, float(to_scalar(rate)), int(to_scalar(count)), *parts) for parts in zip(*groups, strict=True)
        ]
        return tuple(result[i] for i in range(len(results[0])) for result in results)

    return run


def _adagrad(call: Call, rate: float, count: int, x: Tensor, grad: Tensor, total: Tensor) -> tuple[Tensor, ...]:
    rate = rate / (1 + count * call.get("decay_factor", 0.0))
    grad = grad + call.get("norm_coefficient", 0.0) * x
    total = total + grad * grad
    return x - rate * grad / (total.sqrt() + call.get("epsilon", 1e-6)), total


def _adam(
    call: Call, rate: float, count: int, x: Tensor, grad: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, ...]:
    alpha, beta = call.get("alpha", 0.9), call.get("beta", 0.999)
    grad = grad + call.get("norm_coefficient", 0.0) * x
    first, second = alpha * first + (1 - alpha) * grad, beta * second + (1 - beta) * grad * grad
    if count > 0:
        rate = rate * (1 - beta**count) ** 0.5 / (1 - alpha**count)
    new = x - rate * first / (second.sqrt() + call.get("epsilon", 1e-6))
    return (1 - call.get("norm_coefficient_post", 0.0)) * new, first, second


def _momentum(call: Call, rate: float, count: int, x: Tensor, grad: Tensor, speed: Tensor) -> tuple[Tensor, ...]:
    alpha = call.need("alpha")
    beta = call.need("beta") if count > 0 else 1.0
    grad = grad + call.get("norm_coefficient", 0.0) * x
    speed = alpha * speed + beta * grad
    return x - rate * (grad + alpha * speed if call.get("mode", "standard") == "nesterov" else speed), speed


OPS: dict[str, Function] = {
    "ai.onnx.ml.ArrayFeatureExtractor": array_feature_extractor,
    "ai.onnx.ml.Binarizer": binarizer,
    "ai.onnx.ml.LabelEncoder": label_encoder,
    "ai.onnx.ml.Scaler": scaler,
    "ai.onnx.ml.TreeEnsemble": tree_ensemble,
    "ai.onnx.preview.training.Adagrad": per_tensor(_adagrad, 3),
    "ai.onnx.preview.training.Adam": per_tensor(_adam, 4),
    "ai.onnx.preview.training.Momentum": per_tensor(_momentum, 3),
}
