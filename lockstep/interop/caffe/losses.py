"""Loss and accuracy layers, with Caffe's normalisers.

Legend: M rows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.interop.caffe.ops import Function, Shapes, axis_of
from lockstep.interop.caffe.reader import LayerSpec

_NORMALISATIONS = ("FULL", "VALID", "BATCH_SIZE", "NONE")


def _normaliser(layer: LayerSpec, default: str) -> Callable[[int, Tensor], Tensor | float]:
    """What a sum of losses is divided by, from the batch size and the mask of entries that count."""
    param = layer.param("loss_param")
    mode = param.enum("normalization", _NORMALISATIONS, "")
    if not mode:
        mode = default if "normalize" not in param else "VALID" if param.flag("normalize", True) else "BATCH_SIZE"

    def divide_by(num: int, mask: Tensor) -> Tensor | float:
        sizes = {"FULL": float(mask.numel()), "BATCH_SIZE": float(num), "NONE": 1.0}
        return max(sizes[mode], 1.0) if mode in sizes else mask.sum().clamp(min=1)

    return divide_by


def _ignored(layer: LayerSpec) -> int | None:
    param = layer.param("loss_param")
    return param.integer("ignore_label", 0) if "ignore_label" in param else None


def _softmax_with_loss(layer: LayerSpec, shapes: Shapes) -> Function:
    axis = axis_of(layer, layer.param("softmax_param").integer("axis", 1), len(shapes[0]))
    ignored, divide_by = _ignored(layer), _normaliser(layer, "VALID")
    gives_probabilities = len(layer.tops) > 1

    def loss(scores: Tensor, label: Tensor) -> Tensor | tuple[Tensor, ...]:
        logprob = F.log_softmax(scores, axis).movedim(axis, -1)
        target = label.reshape(logprob.shape[:-1]).long()
        mask = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
        picked = logprob.gather(-1, target.where(mask, 0)[..., None])[..., 0]
        # Caffe's logarithm of no probability below the smallest normal float.
        picked = picked.clamp(min=math.log(torch.finfo(torch.float32).tiny))
        outer = math.prod(scores.shape[:axis])
        value = -(picked * mask).sum() / divide_by(outer, mask)
        return (value, logprob.exp().movedim(-1, axis)) if gives_probabilities else value

    return loss


def _euclidean(layer: LayerSpec, shapes: Shapes) -> Function:
    if math.prod(shapes[0]) != math.prod(shapes[1]):
        raise layer.fail(f"inputs of shapes {list(shapes)}; equal numbers of entries were expected")
    return lambda x, y: (x - y.reshape(x.shape)).square().sum() / (2 * x.shape[0])


def _sigmoid_cross_entropy(layer: LayerSpec, shapes: Shapes) -> Function:
    ignored, divide_by = _ignored(layer), _normaliser(layer, "BATCH_SIZE")

    def loss(x: Tensor, target: Tensor) -> Tensor:
        target = target.reshape(x.shape)
        mask = torch.ones_like(target, dtype=torch.bool) if ignored is None else target.trunc() != ignored
        losses = F.binary_cross_entropy_with_logits(x, target.to(x.dtype), reduction="none")
        return (losses * mask).sum() / divide_by(x.shape[0], mask)

    return loss


def _hinge(layer: LayerSpec, shapes: Shapes) -> Function:
    norm = layer.param("hinge_loss_param").enum("norm", ("", "L1", "L2"), "L1")

    def loss(x: Tensor, label: Tensor) -> Tensor:
        rows = x.flatten(1)
        sign = 1 - 2 * F.one_hot(label.reshape(-1).long(), rows.shape[1]).to(x.dtype)
        margins = (1 + sign * rows).clamp(min=0)
        return (margins.square() if norm == "L2" else margins).sum() / x.shape[0]

    return loss


def _multinomial(layer: LayerSpec, shapes: Shapes) -> Function:
    def loss(probability: Tensor, label: Tensor) -> Tensor:
        rows = probability.flatten(1)
        picked = rows.gather(1, label.reshape(-1, 1).long()).clamp(min=1e-20)
        return -picked.log().sum() / rows.shape[0]

    return loss


def _contrastive(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("contrastive_loss_param")
    margin, legacy = param.real("margin", 1.0), param.flag("legacy_version", False)

    def loss(a: Tensor, b: Tensor, similar: Tensor) -> Tensor:
        squares = (a - b).flatten(1).square().sum(1)
        apart = (margin - squares).clamp(min=0) if legacy else (margin - squares.sqrt()).clamp(min=0).square()
        return torch.where(similar.reshape(-1) != 0, squares, apart).sum() / (2 * a.shape[0])

    return loss


def _accuracy(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("accuracy_param")
    k, axis = param.integer("top_k", 1), axis_of(layer, param.integer("axis", 1), len(shapes[0]))
    ignored = param.integer("ignore_label", 0) if "ignore_label" in param else None
    if len(layer.tops) > 1:
        raise layer.fail("a second output, the accuracy of each class, is not supported")

    def accuracy(scores: Tensor, label: Tensor) -> Tensor:
        rows = scores.movedim(axis, -1)
        target = label.reshape(rows.shape[:-1]).long()
        mask = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
        own = rows.gather(-1, target.where(mask, 0)[..., None])
        # Right where fewer than k others reach the label's score.
        hits = ((rows >= own).sum(-1) <= k) & mask
        return hits.sum() / mask.sum().clamp(min=1)

    return accuracy


LOSSES: dict[str, tuple[Callable[[LayerSpec, Shapes], Function], int, float]] = {
    "Accuracy": (_accuracy, 2, 0.0),
    "ContrastiveLoss": (_contrastive, 3, 1.0),
    "EuclideanLoss": (_euclidean, 2, 1.0),
    "HingeLoss": (_hinge, 2, 1.0),
    "MultinomialLogisticLoss": (_multinomial, 2, 1.0),
    "SigmoidCrossEntropyLoss": (_sigmoid_cross_entropy, 2, 1.0),
    "SoftmaxWithLoss": (_softmax_with_loss, 2, 1.0),
}
"""The type's name -> (what makes its function, number of inputs, weight in the objective unless the layer gives one)."""
