"""Adam with global-norm clipping, and Polyak averaging, one call for all tensors of a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import CheckpointError, ConfigError, InputError
from lockstep.kernels import native
from lockstep.kernels.adam import cpu, naive

POLYAK = {"naive": naive.polyak, "cpu": cpu.polyak}


class FusedAdam:
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019).

    Args:
        params: tensors that are changed in place; those whose `.grad` is None at a step are left alone.
        lr: may be assigned between steps.
        weight_decay: p is multiplied by 1 - lr * weight_decay before the step.

    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> p.grad = torch.tensor([3.0, 4.0])
    >>> FusedAdam([p], lr=0.1).step()
    5.0
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.params = list(params)
        if not self.params:
            raise ConfigError("the optimiser got no parameters; pass module.parameters()")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ConfigError(
                f"expected lr, eps, weight_decay >= 0 and betas in [0, 1); got lr={lr}, eps={eps}, "
                f"weight_decay={weight_decay}, betas={betas}"
            )
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.num_steps = 0
        self.exp_avgs = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self._addresses = cpu.Addresses(self.params, self.exp_avgs, self.exp_avg_sqs)

    def step(self, max_grad_norm: float | None = None) -> float:
        """Apply the gradients; returns their global L2 norm before clipping by min(1, max / (norm + 1e-6))."""
        self.num_steps += 1
        grads = [p.grad for p in self.params]
        scalars = (self.lr, self.betas, self.eps, self.weight_decay, self.num_steps, max_grad_norm)
        if native.usable():
            if not self._addresses.hold():
                self._addresses = cpu.Addresses(self.params, self.exp_avgs, self.exp_avg_sqs)
            if self._addresses.fits:
                return self._addresses.step(grads, *scalars)
        with torch.no_grad():
            return naive.step(self.params, grads, self.exp_avgs, self.exp_avg_sqs, *scalars)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self.params:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors: `step`, and per parameter `exp_avg` and `exp_avg_sq`; `lr` is a float."""
        return {
            "step": torch.tensor(self.num_steps, dtype=torch.int64),
            "lr": self.lr,
            "exp_avg": [t.clone() for t in self.exp_avgs],
            "exp_avg_sq": [t.clone() for t in self.exp_avg_sqs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: for missing fields or shapes that are not those of the parameters.
        """
        missing = {"step", "exp_avg", "exp_avg_sq"} - set(state)
        if missing:
            raise CheckpointError(f"optimiser state lacks {sorted(missing)}; it has {sorted(state)}")
        for name, mine in (("exp_avg", self.exp_avgs), ("exp_avg_sq", self.exp_avg_sqs)):
            shapes = [tuple(t.shape) for t in state[name]]
            if shapes != [tuple(t.shape) for t in mine]:
                raise CheckpointError(
                    f"optimiser state {name} has shapes {shapes}; the parameters have {[tuple(t.shape) for t in mine]}"
                )
            for target, source in zip(mine, state[name], strict=True):
                target.copy_(source)
        self.num_steps = int(state["step"])
        self.lr = float(state.get("lr", self.lr))


def polyak(targets: Sequence[Tensor], sources: Sequence[Tensor], tau: float) -> None:
    """target += tau * (source - target) for each pair, in place."""
    for target, source in zip(targets, sources, strict=True):
        if target.shape != source.shape:
            raise InputError(f"polyak pairs {tuple(target.shape)} with {tuple(source.shape)}", field="sources")
    fast = all(t.is_contiguous() and native.choose(t) == "cpu" for t in (*targets, *sources))
    POLYAK["cpu" if fast else "naive"](targets, sources, tau)
