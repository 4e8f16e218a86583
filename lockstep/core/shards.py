"""How one tensor is divided among the ranks of a mesh axis: declared by a model family, carried out by whoever places it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError

ShardAxis = Literal["tp", "ep"]


@dataclass(frozen=True)
class ShardSpec:
    """Dimension `dim` is split over `axis`. A tensor without a spec is whole on every rank.

    `parts` are the lengths of matrices that lie one after another along `dim`, each of which is split on its own: rank 0
    of a merged (q, k, v) gets the first heads of q, of k and of v. `unit` is what may not be cut: the length of a head.

    >>> spec = ShardSpec(0, "tp", parts=(4, 2))
    >>> [spec.shard(torch.arange(6), rank, 2).tolist() for rank in range(2)]
    [[0, 1, 4], [2, 3, 5]]
    >>> spec.join([torch.tensor([0, 1, 4]), torch.tensor([2, 3, 5])]).tolist()
    [0, 1, 2, 3, 4, 5]
    """

    dim: int
    axis: ShardAxis
    parts: tuple[int, ...] = ()
    unit: int = 1

    def shard(self, tensor: Tensor, rank: int, num_ranks: int) -> Tensor:
        """The piece of `rank`, contiguous.

        Raises:
            ConfigError: a part does not divide into `num_ranks` pieces of whole units.
        """
        lengths = self.parts or (tensor.shape[self.dim],)
        for length in lengths:
            if length % (num_ranks * self.unit):
                raise ConfigError(
                    f"{self.axis}={num_ranks} does not divide {length // self.unit} units of length {self.unit}; "
                    f"use a divisor of {length // self.unit}"
                )
        pieces = torch.split_with_sizes(tensor, list(lengths), self.dim)
        return torch.cat([piece.chunk(num_ranks, self.dim)[rank] for piece in pieces], self.dim).contiguous()

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the pieces of all ranks, in order."""
        num_ranks = len(shards)
        lengths = [length // num_ranks for length in self.parts] or [shards[0].shape[self.dim]]
        split = [torch.split_with_sizes(shard, lengths, self.dim) for shard in shards]
        return torch.cat([pieces[part] for part in range(len(lengths)) for pieces in split], self.dim)
