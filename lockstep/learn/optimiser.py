"""How weights change: AdamW and Muon, schedules of the step size, clipping, and averages of weights.

Legend: N outputs, K inputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lockstep.core.errors import CheckpointError, ConfigError
from lockstep.kernels.adam import FusedAdam, polyak
from lockstep.layers.embedding import Embedding
from lockstep.layers.moe import ExpertProjection
from lockstep.layers.projection import Projection

ScheduleKind = Literal["constant", "linear", "cosine"]
OptimiserKind = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The factor on the learning rate at each optimiser step.

    >>> schedule = ScheduleConfig(kind="linear", warmup_steps=2, total_steps=6)
    >>> [schedule.factor(step) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    kind: ScheduleKind = "constant"
    """What follows the warm-up: constant, linear to `final`, or half a cosine to `final`."""
    warmup_steps: int = 0
    """Steps over which the factor rises linearly; step i of them has (i + 1) / warmup_steps."""
    total_steps: int = 0
    """Optimiser steps until `final` is reached; not read by a constant schedule. 0: the loop's own number of steps."""
    final: float = 0.0
    """Factor at the end."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise ConfigError(f"schedule kind={self.kind!r}; expected one of {', '.join(get_args(ScheduleKind))}")
        if self.warmup_steps < 0 or self.total_steps < 0 or not 0.0 <= self.final <= 1.0:
            raise ConfigError(
                f"schedule warmup_steps={self.warmup_steps}, total_steps={self.total_steps}, final={self.final}; expected "
                "steps of 0 or more and 0 <= final <= 1"
            )
        if self.total_steps and self.total_steps <= self.warmup_steps:
            raise ConfigError(
                f"schedule total_steps={self.total_steps} ends within warmup_steps={self.warmup_steps}; expected more"
            )

    def factor(self, step: int) -> float:
        """Of the update number `step`, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.total_steps == 0:
            raise ConfigError(f"a {self.kind} schedule needs total_steps; give the number of optimiser steps")
        done = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        shape = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.final + (1.0 - self.final) * shape


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for the matrices of layers and AdamW for the rest."""

    kind: OptimiserKind = "adamw"
    """adamw or muon."""
    lr: float = 1e-5
    """Of AdamW, before the schedule."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: float = 1e-8
    """Added to AdamW's root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled; on matrices and embeddings, never on norms, biases and other vectors."""
    max_grad_norm: float = 1.0
    """The gradient's global L2 norm is clipped to it (0: not clipped)."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Factor on all learning rates over the optimiser's steps."""
    muon_lr: float = 0.02
    """Of Muon, before the schedule."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon."""
    muon_steps: int = 5
    """Newton-Schulz iterations."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(OptimiserKind):
            raise ConfigError(f"optimiser kind={self.kind!r}; expected one of {', '.join(get_args(OptimiserKind))}")
        for name in ("lr", "eps", "weight_decay", "max_grad_norm", "muon_lr"):
            value = self.__dict__[name]
            if not 0.0 <= value < math.inf:
                raise ConfigError(f"optimiser {name}={value}; expected a finite number, 0 or more")
        if not self.lr and not (self.kind == "muon" and self.muon_lr):
            raise ConfigError(f"optimiser lr={self.lr} changes no weight; give a learning rate above 0")
        if not all(0.0 <= beta < 1.0 for beta in (*self.betas, self.muon_momentum)):
            raise ConfigError(f"betas={self.betas}, muon_momentum={self.muon_momentum}; expected them in [0, 1)")
        if self.muon_steps < 1:
            raise ConfigError(f"muon_steps={self.muon_steps}; expected 1 or more")

    def ending(self, total_steps: int) -> OptimiserConfig:
        """With a schedule that ends after `total_steps`, unless it says when itself.

        Raises:
            ConfigError: it would end before it has warmed up.
        """
        if self.schedule.total_steps or not total_steps or self.schedule.kind == "constant":
            return self
        if total_steps <= self.schedule.warmup_steps:
            raise ConfigError(
                f"{total_steps} optimiser steps in all with optimiser.schedule.warmup_steps={self.schedule.warmup_steps} end "
                f"before the {self.schedule.kind} schedule begins; give more steps (total_steps, or steps of a supervised "
                "start), or fewer warmup_steps"
            )
        return replace(self, schedule=replace(self.schedule, total_steps=total_steps))


class Muon:
    """Momentum whose matrix is replaced by the nearest one with equal singular values (Jordan et al. 2024).

    m ← μ m + g;  u = NewtonSchulz(g + μ m);  W ← (1 − lr·decay) W − lr √max(1, N / K) u. A merged matrix (q, k and v
    beside each other) is treated part by part, a stack of experts expert by expert.

    Args:
        params: [N, K] or [X, N, K], float32.
        parts: of each, the N of its parts.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        parts: Sequence[Sequence[int]],
        *,
        lr: float,
        momentum: float,
        steps: int,
        weight_decay: float,
    ) -> None:
        self.params, self.parts = list(params), [list(sizes) for sizes in parts]
        self.lr, self.momentum, self.num_iterations, self.weight_decay = lr, momentum, steps, weight_decay
        self.momenta = [torch.zeros_like(p, requires_grad=False) for p in self.params]

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients; a parameter without one is left alone."""
        for p, sizes, m in zip(self.params, self.parts, self.momenta, strict=True):
            if p.grad is None:
                continue
            m.mul_(self.momentum).add_(p.grad)
            update = p.grad.add(m, alpha=self.momentum)
            if self.weight_decay:
                p.mul_(1.0 - self.lr * self.weight_decay)
            for target, part in zip(p.split(sizes, dim=-2), update.split(sizes, dim=-2), strict=True):
                scale = max(1.0, part.shape[-2] / part.shape[-1]) ** 0.5
                target.sub_(orthogonalised(part, self.num_iterations), alpha=self.lr * scale)

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": [m.clone() for m in self.momenta]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: shapes that are not those of the parameters.
        """
        _load_tensors("Muon's momentum", self.momenta, state["momentum"])


def orthogonalised(g: Tensor, steps: int) -> Tensor:
    """About U Vᵀ of g = U S Vᵀ by `steps` quintic Newton-Schulz iterations with Jordan's coefficients, which send every
    singular value into about 0.7 .. 1.2 rather than to 1.

    >>> u = orthogonalised(torch.diag(torch.tensor([3.0, 0.5])), 5)
    >>> bool(((u.diagonal() > 0.6) & (u.diagonal() < 1.3)).all()), float(u[0, 1])
    (True, 0.0)
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = g.shape[-2] > g.shape[-1]
    x = g.mT if is_tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Optimiser:
    """All trainable parameters of some modules under one `OptimiserConfig`.

    `step` clips, applies and counts; gradients are dropped by `zero_grad`.
    """

    def __init__(self, modules: Sequence[nn.Module], config: OptimiserConfig) -> None:
        self.config = config
        self.num_steps = 0
        matrices = layer_matrices(modules) if config.kind == "muon" else {}
        self.params = trainable(modules)
        if not self.params:
            raise ConfigError("nothing to train: no parameter requires a gradient; load the model with trainable=True")
        rest = [p for p in self.params if p not in matrices]
        decayed, plain = [p for p in rest if p.dim() > 1], [p for p in rest if p.dim() <= 1]
        if not config.weight_decay:
            decayed, plain = rest, []
        self._adams = [
            FusedAdam(group, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=decay)
            for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
            if group
        ]
        self._muon: Muon | None = None
        if matrices:
            self._muon = Muon(
                list(matrices),
                list(matrices.values()),
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                steps=config.muon_steps,
                weight_decay=config.weight_decay,
            )

    @property
    def lr(self) -> float:
        """AdamW's learning rate of the next step."""
        return self.config.lr * self.config.schedule.factor(self.num_steps)

    def grad_norm(self) -> float:
        """Global L2 norm of the gradients, in float64; NaN or infinite where a gradient is."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if not grads:
            return 0.0
        return float(torch.stack([norm.double() for norm in torch._foreach_norm(grads)]).norm())

    def step(self, norm: float | None = None) -> float:
        """Apply the gradients, clipped; returns their norm before clipping.

        Args:
            norm: what `grad_norm` returned, if the caller has asked.
        """
        norm = self.grad_norm() if norm is None else norm
        limit = self.config.max_grad_norm
        if limit and norm > limit:
            torch._foreach_mul_([p.grad for p in self.params if p.grad is not None], limit / (norm + 1e-6))
        factor = self.config.schedule.factor(self.num_steps)
        for adam in self._adams:
            adam.lr = self.config.lr * factor
            adam.step()
        if self._muon is not None:
            self._muon.lr = self.config.muon_lr * factor
            self._muon.step()
        self.num_steps += 1
        return norm

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self.params:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_steps": self.num_steps,
            "adams": [adam.state_dict() for adam in self._adams],
            "muon": None if self._muon is None else self._muon.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: the state is of another kind of optimiser or of other parameters.
        """
        if len(state["adams"]) != len(self._adams) or (state["muon"] is None) != (self._muon is None):
            raise CheckpointError(
                f"the checkpoint's optimiser has {len(state['adams'])} AdamW groups and "
                f"{'no ' if state['muon'] is None else ''}Muon; this configuration makes another: resume with the "
                "configuration of the run"
            )
        for adam, one in zip(self._adams, state["adams"], strict=True):
            adam.load_state_dict(one)
        if self._muon is not None:
            self._muon.load_state_dict(state["muon"])
        self.num_steps = int(state["num_steps"])


def trainable(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Parameters that require a gradient, each once, in the order of the modules."""
    found = {p: None for module in modules for p in module.parameters() if p.requires_grad}
    return list(found)


def layer_matrices(modules: Sequence[nn.Module]) -> dict[nn.Parameter, Sequence[int]]:
    """What Muon is for: the trained matrices of layers and the sizes of their merged parts; neither embeddings nor heads
    that map to a vocabulary, which AdamW takes."""
    apart: set[nn.Parameter] = set()
    for module in modules:
        for name, part in module.named_modules():
            if isinstance(part, Embedding) or (name == "head" and isinstance(part, Projection)):
                apart.update(part.parameters())
    return {
        part.weight: part.out_sizes
        for module in modules
        for part in module.modules()
        if isinstance(part, Projection | ExpertProjection)
        and part.weight is not None
        and part.weight.requires_grad
        and part.weight not in apart
        and part.weight.shape[-2] > 1  # a single row, such as a value head, is a vector
    }


class Ema:
    """Exponential moving average of parameters: average ← average + (1 − decay) (weights − average) after each step."""

    def __init__(self, params: Sequence[nn.Parameter], decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ConfigError(f"ema decay={decay}; expected 0 < decay < 1")
        self.params, self.decay = list(params), decay
        self.averages = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights."""
        polyak(self.averages, [p.detach() for p in self.params], 1.0 - self.decay)

    def write(self, params: Sequence[nn.Parameter]) -> None:
        """The averages into parameters of the same shapes and order as those that are averaged."""
        _copy(params, self.averages)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": [average.clone() for average in self.averages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: shapes that are not those of the parameters.
        """
        _load_tensors("the average of weights", self.averages, state["averages"])


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _load_tensors(what: str, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    shapes, expected = [tuple(t.shape) for t in sources], [tuple(t.shape) for t in targets]
    if shapes != expected:
        raise CheckpointError(f"{what} has shapes {shapes}; the parameters have {expected}")
    _copy(targets, sources)


def load_parameters(named: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into parameters of the same names.

    Raises:
        CheckpointError: names or shapes that differ.
    """
    if set(named) != set(saved):
        missing, unknown = sorted(set(named) - set(saved)), sorted(set(saved) - set(named))
        raise CheckpointError(f"the checkpoint lacks parameters {missing[:3]} and has unknown ones {unknown[:3]}")
    for name, parameter in named.items():
        if parameter.shape != saved[name].shape:
            raise CheckpointError(
                f"{name} is {tuple(saved[name].shape)} in the checkpoint; the model has {tuple(parameter.shape)}"
            )
    _copy(list(named.values()), [saved[name] for name in named])
