"""A layer whose activations are computed again in the backward pass instead of kept (Chen et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_layer(layer: nn.Module, recompute: bool, *args: Any) -> Any:
    """layer(*args). With `recompute`, and where gradients are recorded, only its inputs are kept; the numbers and the
    gradients are the same bits, because every op of a layer is deterministic."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
    return layer(*args)
