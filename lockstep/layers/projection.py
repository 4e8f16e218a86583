"""Matrices of language models: a float weight that can be trained, the packed form that is computed with, or both.

Legend: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lockstep.core.adapters import AdapterRun
from lockstep.core.errors import ConfigError, InputError, unknown_name
from lockstep.core.planes import QuantPlanes
from lockstep.core.tensors import QuantisedTensor
from lockstep.kernels.low_rank import LowRankRun, add_low_rank
from lockstep.kernels.packed_linear import (
    PackedWeight,
    pack,
    pack_blocks,
    pack_planes,
    packed_linear,
    trained_linear,
    unpack,
)
from lockstep.kernels.packed_linear.blocks import joined

Format = Literal["fp32", "bf16", "int8", "int4"]
FORMATS: tuple[str, ...] = get_args(Format)
Matrix = Tensor | QuantPlanes | QuantisedTensor
"""As a file gives it: numbers, or codes and scales, or the blocks that these lie in."""


@dataclass(frozen=True)
class Precision:
    """How a model's matrices are stored and multiplied.

    >>> Precision.of("bf16", trainable=True)
    Precision(compute='bf16', group=32, master=torch.float32)
    """

    compute: Format = "fp32"
    """Format of the packed weights: what a product reads."""
    group: int = 32
    """Columns that share a scale in int8 and int4."""
    master: torch.dtype | None = torch.float32
    """Type of the weights that the optimiser changes; None keeps only the packed form, which cannot be trained."""

    @staticmethod
    def of(compute: str, *, trainable: bool, group: int = 32) -> Precision:
        """Checked.

        Raises:
            ConfigError: unknown format or group; a quantised format that is to be trained.
        """
        for known in get_args(Format):
            if compute == known:
                break
        else:
            raise ConfigError(unknown_name("dtype", compute, FORMATS))
        if group not in (32, 64, 128):
            raise ConfigError(f"group is {group}; expected 32, 64 or 128")
        if trainable and known in ("int8", "int4"):
            raise ConfigError(
                f"{known} weights are integers and cannot be trained; use bf16 or fp32, or trainable=False"
            )
        return Precision(known, group, torch.float32 if trainable else None)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values, in the cache and in training."""
        return torch.float32 if self.compute == "fp32" else torch.bfloat16


class Projection(nn.Module):
    """y = x Wᵀ + b with W [N, K]; several matrices that read the same input lie in W one after another.

    With a `master` the float weight is the truth and its packed copy follows it: a product repacks when the weight's
    version has moved, into the same memory. Writing through `.data` or a pointer does not move it; call `repack` then.
    Without a master only the packed form exists. Empty until `fill`, `fill_random` or a state dict.

    """

    def __init__(self, in_size: int, out_sizes: Sequence[int], precision: Precision, *, bias: bool = False) -> None:
        super().__init__()
        self.in_size = in_size
        self.out_sizes = tuple(out_sizes)
        self.path = ""
        """Name in the model, by which an adapter knows the matrix; `name_matrices` sets it."""
        self.precision = precision
        self._trained = precision.master is not None
        self.weight: nn.Parameter | None
        out_size = sum(self.out_sizes)
        if precision.master is None:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=precision.master))
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_size))
        else:
            self.register_parameter("bias", None)
        self._packs: list[PackedWeight] = []
        self._packed_key: tuple[int, int] | None = None

    def forward(self, x_MK: Tensor, adapters: Sequence[AdapterRun] = ()) -> Tensor:
        """x [M, K] float32 -> [M, N] float32, plus what the rows' adapters add. A row's bits depend neither on the other
        rows nor on whether gradients are recorded; without a float weight only x has a gradient."""
        y_MN = self._base(x_MK)
        return add_low_rank(y_MN, x_MK, adapter_runs(self.path, adapters)) if adapters else y_MN

    def _base(self, x_MK: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight is not None or len(self._packs) == 1:
            return self._product(x_MK, weight, self.packed(), bias)
        if not self._packs:
            raise InputError("the projection holds no weights yet; load or initialise the model first", field="weight")
        y_MN = torch.cat([self._product(x_MK, None, packed, None) for packed in self._packs], dim=1)
        return y_MN if bias is None else y_MN + bias

    @staticmethod
    def _product(x_MK: Tensor, weight: Tensor | None, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            return trained_linear(x_MK, weight, packed, bias)
        return packed_linear(x_MK, packed, bias)

    def packs(self) -> list[PackedWeight]:
        """The packed matrices that lie beside each other in the output, made anew if the float weight has changed since;
        the same list until they are other matrices."""
        if self._trained:
            weight = self.weight
            assert weight is not None
            key = (weight._version, weight.data_ptr())
            if key != self._packed_key:
                again = self._packs[0] if self._packs else None
                packed = pack(weight.detach(), self.precision.compute, self.precision.group, into=again)
                # Written into the same memory: whoever holds the list need not know.
                if again is None or packed.data.data_ptr() != again.data.data_ptr():
                    self._packs = [packed]
                self._packed_key = key
        return self._packs

    def packed(self) -> PackedWeight:
        """The one packed matrix.

        Raises:
            InputError: the matrices came in different quantised formats and are not one.
        """
        packs = self.packs()
        if len(packs) != 1:
            raise InputError(f"the projection holds {len(packs)} packed matrices; expected one", field="weight")
        return packs[0]

    def repack(self) -> None:
        """The float weight was written in a way that torch does not see: pack it at the next product."""
        self._packed_key = None

    @torch.no_grad()
    def fill(self, parts: Sequence[Matrix]) -> None:
        """Take the matrices, [out_sizes[i], K] each; quantised ones stay as they are where nothing is trained."""
        weight = self.weight
        if weight is not None:
            start = 0
            for size, part in zip(self.out_sizes, parts, strict=True):
                weight[start : start + size].copy_(plain(part))
                start += size
            return
        self._packs = pack_parts(parts, self.precision)

    def share(self, packed: PackedWeight) -> None:
        """Take a packed matrix that another module has: both read the same memory. Only without a float weight."""
        assert self.weight is None
        self._packs = [packed]

    @torch.no_grad()
    def fill_random(self, generator: torch.Generator, std: float) -> None:
        """Normal weights of standard deviation `std`, zero biases."""
        if self.bias is not None:
            self.bias.zero_()
        if self.weight is not None:
            self.weight.normal_(0.0, std, generator=generator)
            return
        dtype = torch.float32 if self.precision.compute == "fp32" else torch.bfloat16
        shape = (sum(self.out_sizes), self.in_size)
        self.fill(
            list(torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator).split(list(self.out_sizes)))
        )

    @torch.no_grad()
    def parts(self) -> list[Tensor]:
        """The matrices [out_sizes[i], K]: the float weight's, or what the packed form stands for."""
        if self.weight is not None:
            return list(self.weight.detach().split(list(self.out_sizes)))
        if not self._packs:
            raise InputError("the projection holds no weights yet", field="weight")
        return list(torch.cat([unpack(packed) for packed in self._packs]).split(list(self.out_sizes)))

    def extra_repr(self) -> str:
        return f"{self.in_size} -> {self.out_sizes}, {self.precision.compute}"


def adapter_runs(path: str, adapters: Sequence[AdapterRun]) -> list[LowRankRun]:
    """What the adapters of a batch's rows add to the matrix with this name.

    Raises:
        InputError: the matrix has no name, so that no adapter could be meant for it.
    """
    if not path:
        raise InputError("the model's matrices have no names; call name_matrices(model) first", field="adapters")
    return [LowRankRun(run.first_row, run.last_row, pair) for run in adapters for pair in run.adapter.pairs(path)]


def plain(part: Matrix) -> Tensor:
    """The matrix as numbers."""
    if isinstance(part, Tensor):
        return part
    return part.dequantise() if isinstance(part, QuantPlanes) else torch.from_numpy(part.dequantise())


def pack_parts(parts: Sequence[Matrix], precision: Precision) -> list[PackedWeight]:
    """Matrices that read one input, packed: neighbours of one quantised format, and all float ones beside each other,
    become one matrix, computed in one pass over the input."""
    runs: list[list[Matrix]] = []
    for part in parts:
        if runs and _kind(runs[-1][-1]) == _kind(part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return [_pack_run(run, precision) for run in runs]


def _pack_run(run: Sequence[Matrix], precision: Precision) -> PackedWeight:
    planes = [part for part in run if isinstance(part, QuantPlanes)]
    if planes:
        return pack_planes(joined(planes))
    blocks = [part for part in run if not isinstance(part, Tensor | QuantPlanes)]
    if blocks:
        return pack_blocks(blocks)
    whole = torch.cat([plain(part) for part in run]) if len(run) > 1 else plain(run[0])
    return pack(whole, precision.compute, precision.group)


def _kind(part: Matrix) -> tuple[object, ...]:
    if isinstance(part, Tensor):
        return ()
    if isinstance(part, QuantPlanes):
        return part.group, part.bits, part.table, part.minimum_NB is None
    return (part.kind,)
