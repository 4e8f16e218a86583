"""The optimiser of control policies."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lockstep import kernels


def make_optimiser(
    module: nn.Module | Iterable[nn.Parameter],
    lr: float,
    *,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
) -> kernels.FusedAdam:
    """Adam over every trainable parameter of a module (or a list of parameters), one kernel call per step."""
    parameters = module.parameters() if isinstance(module, nn.Module) else module
    return kernels.FusedAdam([p for p in parameters if p.requires_grad], lr=lr, betas=betas, eps=eps)
