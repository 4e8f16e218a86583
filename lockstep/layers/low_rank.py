"""A low-rank adapter: what is trained beside a frozen model, and what the engine adds for the rows that ask for it.

The adapter is a module of its own. The model stays as it is: a batch says which rows go through which adapter
(`ForwardBatch.adapters`), so one forward pass serves many, and leaving it out is the base model.

Legend: K inputs, R rank, N outputs of one part of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lockstep.core.adapters import LowRankPair
from lockstep.core.errors import InputError, unknown_name
from lockstep.layers.moe import ExpertProjection
from lockstep.layers.projection import Projection


@dataclass(frozen=True)
class AdapterSlot:
    """One matrix of a model as its checkpoints have it; several of them may lie beside each other in one of ours."""

    name: str
    """In Hugging Face checkpoints, without ".weight"."""
    path: str
    """Of our module; of an expert's with ".x" behind."""
    in_size: int
    out_size: int
    first_column: int
    """In the output of our module."""


class LowRank(nn.Module):
    """The pair of one slot: y += scale * (x a) b."""

    def __init__(self, slot: AdapterSlot, rank: int, alpha: float, *, rank_stabilised: bool) -> None:
        super().__init__()
        self.slot, self.rank, self.alpha = slot, rank, alpha
        self.scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        self.a = nn.Parameter(torch.zeros(slot.in_size, rank))
        """[K, R], the transpose of the paper's A: the layout that the kernel reads."""
        self.b = nn.Parameter(torch.zeros(rank, slot.out_size))
        """[R, N]."""

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the pair adds to its matrix: scale * B A, float32 [N, K], summed in float64."""
        return (self.scale * (self.a.double() @ self.b.double())).T.to(torch.float32)

    def pair(self) -> LowRankPair:
        """As the kernels take it."""
        return LowRankPair(self.a, self.b, self.scale, self.slot.first_column)


class Adapter(nn.Module):
    """The pairs of some of a model's matrices, in the model's order (Hu et al. 2021).

    Args:
        pairs: slots of one model, each at most once.
        rank_stabilised: their scale is alpha / sqrt(rank) (Kalajdzievski 2023); kept for the files that are written.
    """

    def __init__(self, pairs: Iterable[LowRank], *, rank_stabilised: bool = False) -> None:
        super().__init__()
        self.rank_stabilised = rank_stabilised
        # A module's name holds no dot.
        self.slots = nn.ModuleDict({pair.slot.name.replace(".", "/"): pair for pair in pairs})
        self._by_path: dict[str, list[LowRank]] = {}
        for pair in self:
            self._by_path.setdefault(pair.slot.path, []).append(pair)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.slots.values())

    def __len__(self) -> int:
        return len(self.slots)

    def pairs(self, path: str) -> Sequence[LowRankPair]:
        """See `RowAdapter`."""
        return [pair.pair() for pair in self._by_path.get(path, ())]

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> Adapter:
        """A normal of variance 1 / K, B zero (Hu et al. 2021, section 4.1): the model's outputs are the base's bits."""
        for pair in self:
            pair.a.normal_(0.0, pair.slot.in_size**-0.5, generator=generator)
            pair.b.zero_()
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The paper's A [R, K] and B [N, R] of every slot, as "name.lora_A.weight" and "name.lora_B.weight"."""
        found: dict[str, Tensor] = {}
        for pair in self:
            found[f"{pair.slot.name}.lora_A.weight"] = pair.a.detach().T
            found[f"{pair.slot.name}.lora_B.weight"] = pair.b.detach().T
        return found

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors named and shaped as `tensors` gives them, all of them, or none if one does not fit.

        Raises:
            InputError: a tensor is missing, unknown, mis-shaped or not finite.
        """
        wanted = self.tensors()
        for name in tensors:
            if name not in wanted:
                raise InputError(unknown_name("adapter tensor", name, list(wanted))[:400], field=name)
        for name, old in wanted.items():
            if name not in tensors:
                raise InputError(f"the adapter's tensor {name} is missing", field=name)
            new = tensors[name]
            if new.shape != old.shape:
                raise InputError(f"{name} has shape {tuple(new.shape)}; expected {tuple(old.shape)}", field=name)
            if not bool(torch.isfinite(new).all()):
                raise InputError(f"{name} holds NaN or infinity", field=name)
        for name, old in wanted.items():
            old.copy_(tensors[name])

    def extra_repr(self) -> str:
        return f"{len(self)} matrices, {sum(p.numel() for p in self.parameters()):,} parameters"


def name_matrices(model: nn.Module) -> None:
    """Tell every matrix its name in the model, by which adapters know it."""
    for path, module in model.named_modules():
        if isinstance(module, Projection | ExpertProjection):
            module.path = path
