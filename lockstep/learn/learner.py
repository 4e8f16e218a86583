"""One optimiser step from many micro-batches: forward, loss, backward, clip, step.

The learner knows nothing of how a batch came about or of what its loss means.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lockstep.core.errors import CheckpointError, ConfigError, DivergedError
from lockstep.layers.low_rank import Adapter
from lockstep.learn.logprobs import Logprobs, Truncation, forward_logprobs, micro_logprobs
from lockstep.learn.optimiser import Ema, Optimiser, OptimiserConfig, load_parameters, trainable
from lockstep.learn.packing import MicroBatch
from lockstep.learn.session import Scores
from lockstep.models.language import LanguageModel

Metrics = dict[str, Tensor]
"""Each micro-batch's share of a number: the learner adds them up. A name that ends in "_max" or "_min" is joined so."""

Loss = Callable[[Logprobs, MicroBatch], tuple[Tensor, Metrics]]
"""(this micro-batch's share of the loss, metrics). The loss divides by counts of the whole batch, so that the shares add up
to it however the batch was cut."""

WhichWeights = Literal["trained", "averaged"]


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How a model is trained."""

    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """Optimiser, clipping and schedule."""
    ema_decay: float = 0.0
    """Decay of the moving average of weights, 0.99 for one of about the last hundred steps (0: none is kept)."""
    serve: WhichWeights = "trained"
    """Which weights are evaluated first and written into the run's model folder: trained, or averaged. Where an average is kept
    the others are evaluated too, and written beside, in model-averaged or model-trained."""
    recompute_layers: bool = False
    """Gradient checkpointing: keep each layer's input only. The same bits in less memory and about a third more time."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"ema_decay={self.ema_decay}; expected 0 (none) or 0 < ema_decay < 1")
        if self.serve not in get_args(WhichWeights):
            raise ConfigError(f"serve={self.serve!r}; expected one of {', '.join(get_args(WhichWeights))}")
        if self.serve == "averaged" and not self.ema_decay:
            raise ConfigError("serve='averaged' and ema_decay=0 keeps no average; set ema_decay, such as 0.99")


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """The modules of a learner, with one set of weights."""

    model: LanguageModel
    adapter: Adapter | None
    heads: Mapping[str, nn.Module]
    """All but the adapter."""


class Learner:
    """A model, its optimiser and the average of its weights. Trains whatever requires a gradient, or an adapter alone.

    Args:
        model: with a float master of what is trained.
        adapter: is trained in the model's stead, which is frozen and may be quantised: every row goes through it. The model
            without it is the reference of a KL penalty: `forward_logprobs(learner.model, micros)`.
        heads: more modules that the loss uses and that are trained along, such as a value head, by name.
        total_steps: of the loop; where a schedule's own is 0 it ends there.

    Raises:
        ConfigError: nothing requires a gradient.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: LearnerConfig,
        *,
        adapter: Adapter | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        total_steps: int = 0,
    ) -> None:
        self.model, self.config, self.adapter, self.heads = model, config, adapter, dict(heads or {})
        if adapter is not None:
            model.requires_grad_(False)
            self.heads["adapter"] = adapter
        modules = [model, *self.heads.values()]
        self.optimiser = Optimiser(modules, config.optimiser.ending(total_steps))
        self.ema = Ema(self.optimiser.params, config.ema_decay) if config.ema_decay else None
        model.recompute_layers(config.recompute_layers)

    @property
    def num_steps(self) -> int:
        """Optimiser steps done."""
        return self.optimiser.num_steps

    def step(
        self,
        micros: Sequence[MicroBatch],
        loss: Loss,
        *,
        temperature: float = 1.0,
        truncation: Truncation | None = None,
        entropy: bool = False,
    ) -> dict[str, float]:
        """Accumulate the gradient over the micro-batches and make one optimiser step.

        A micro-batch without a weighted token adds nothing and is not computed.

        Args:
            temperature, truncation, entropy: see `micro_logprobs`.

        Returns:
            the loss's metrics, and "loss", "grad_norm" (before clipping), "lr".

        Raises:
            DivergedError: the loss or the gradient is not finite; weights and optimiser are as before the call.
        """
        total, metrics = self.accumulate(micros, loss, temperature=temperature, truncation=truncation, entropy=entropy)
        return {**metrics, **self.apply(total)}

    def apply(self, total: float = 0.0) -> dict[str, float]:
        """The optimiser step on what `accumulate` gathered: the only moment in which weights change.

        Args:
            total: the loss, checked and handed back.

        Raises:
            DivergedError: as `step`.
        """
        norm = self.optimiser.grad_norm()
        if not (math.isfinite(total) and math.isfinite(norm)):
            self.optimiser.zero_grad()
            raise DivergedError(
                f"optimiser step {self.num_steps + 1}: the loss is {total}, the gradient's norm {norm}; nothing was "
                "changed. Lower the learning rate, or look at the batch's rewards and log-probabilities"
            )
        lr = self.optimiser.lr
        self.optimiser.step(norm)
        self.optimiser.zero_grad()
        if self.ema is not None:
            self.ema.update()
        return {"loss": total, "grad_norm": norm, "lr": lr}

    def accumulate(
        self,
        micros: Sequence[MicroBatch],
        loss: Loss,
        *,
        temperature: float = 1.0,
        truncation: Truncation | None = None,
        entropy: bool = False,
    ) -> tuple[float, dict[str, float]]:
        """The micro-batches' gradients in `.grad`, without a step: (loss, metrics)."""
        self.optimiser.zero_grad()
        total, joined = 0.0, dict[str, float]()
        for micro in micros:
            if micro.num_rows == 0:
                continue
            logprobs = micro_logprobs(
                self.model,
                micro,
                temperature=temperature,
                truncation=truncation,
                adapter=self.adapter,
                entropy=entropy,
            )
            share, metrics = loss(logprobs, micro)
            share.backward()
            total += float(share.detach())
            _join(joined, metrics)
        return total, joined

    def forward_logprobs(
        self, micros: Sequence[MicroBatch], *, temperature: float = 1.0, truncation: Truncation | None = None
    ) -> list[Tensor]:
        """logprob_R of each micro-batch under the present weights, without gradients."""
        return forward_logprobs(
            self.model, micros, temperature=temperature, truncation=truncation, adapter=self.adapter
        )

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; those of a head begin with its name and a colon."""
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for head, module in self.heads.items():
            found |= {f"{head}:{name}": p for name, p in module.named_parameters() if p.requires_grad}
        return found

    def weights(self) -> dict[WhichWeights, Weights]:
        """The trained weights, where they are; and, where an average is kept, copies of all modules that hold it."""
        heads = {name: module for name, module in self.heads.items() if module is not self.adapter}
        found: dict[WhichWeights, Weights] = {"trained": Weights(model=self.model, adapter=self.adapter, heads=heads)}
        if self.ema is not None:
            # Beside an adapter the model is frozen: its own average.
            apart = self.model if self.adapter is not None else copy.deepcopy(self.model)
            adapter, heads = copy.deepcopy((self.adapter, heads))
            modules = [*heads.values()] if adapter is None else [*heads.values(), adapter]
            self.ema.write(trainable([apart, *modules]))
            found["averaged"] = Weights(model=apart, adapter=adapter, heads=heads)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step but the batch: training goes on bit for bit from it."""
        return {
            "parameters": {name: p.detach().clone() for name, p in self.named_parameters().items()},
            "optimiser": self.optimiser.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: of another model, optimiser or choice of trained parameters.
        """
        load_parameters(self.named_parameters(), state["parameters"])
        self.optimiser.load_state_dict(state["optimiser"])
        if (self.ema is None) != (state["ema"] is None):
            kept = "no average" if state["ema"] is None else "an average"
            raise CheckpointError(
                f"the checkpoint holds {kept} of weights and ema_decay={self.config.ema_decay}; "
                "resume with the configuration of the run"
            )
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def evaluated(learner: Learner, ask: Callable[[Weights], Scores]) -> Scores:
    """Scores of the weights that the run serves; where an average is kept the other set's mean stands beside them, in `extra`
    under its name."""
    sets, chosen = learner.weights(), learner.config.serve
    scores = ask(sets.pop(chosen))
    # Before the first step both are the same.
    others: dict[str, float] = {name: ask(one).mean if learner.num_steps else scores.mean for name, one in sets.items()}
    return Scores(scores.values, extra={**scores.extra, **others})


def written(
    learner: Learner, write: Callable[[Weights, Path, Mapping[str, Any]], None]
) -> Callable[[Path, Mapping[str, Any]], None]:
    """What `Session.begin` takes: writes the served weights into the folder, the others into one beside it."""

    def write_all(path: Path, results: Mapping[str, Any]) -> None:
        for name, one in learner.weights().items():
            write(one, path if name == learner.config.serve else path.with_name(f"{path.name}-{name}"), results)

    return write_all


def _join(joined: dict[str, float], metrics: Metrics) -> None:
    for name, value in metrics.items():
        number = float(value.detach())
        if name not in joined:
            joined[name] = number
        elif name.endswith("_max"):
            joined[name] = max(joined[name], number)
        elif name.endswith("_min"):
            joined[name] = min(joined[name], number)
        else:
            joined[name] += number
