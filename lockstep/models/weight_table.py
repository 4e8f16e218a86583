"""Between a model's modules and the tensors of a Hugging Face checkpoint: one list of entries a family, read both ways."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.core.errors import FormatError, InputError
from lockstep.core.tensors import TensorSource
from lockstep.kernels.packed_linear import PackedWeight, unpack
from lockstep.layers.embedding import Embedding
from lockstep.layers.moe import ChoiceBias, ExpertProjection
from lockstep.layers.projection import Matrix, Projection, plain
from lockstep.layers.token_norm import LayerNorm, RMSNorm
from lockstep.models.language import LanguageModel


@dataclass(frozen=True)
class Entry:
    """One module and the tensors it is made of, without their ".weight" and ".bias"; of a `ChoiceBias` the whole name.

    Several names are the parts of a merged projection, in order. With experts a name holds "{}" for the expert.
    """

    module: str
    names: tuple[str, ...]
    transposed: bool = False
    """The file holds [in, out]."""
    whole: bool = False
    """The file holds the parts as one tensor."""


@dataclass(frozen=True)
class WeightTable:
    """What a checkpoint of one model holds."""

    entries: tuple[Entry, ...]
    unused: re.Pattern[str] = field(default_factory=lambda: re.compile(r".*rotary_emb\.inv_freq"))
    """Tensors that some files hold and no model reads."""
    optional_prefix: str = ""
    """Files of the bare decoder leave this prefix out."""


class _Reader:
    """Takes tensors by name, checks shapes, and knows at the end which were never asked for."""

    def __init__(self, source: TensorSource, table: WeightTable) -> None:
        self.source = source
        self.names = dict.fromkeys(source.names())
        self.taken: set[str] = set()
        prefix = table.optional_prefix
        self.bare = bool(prefix) and not any(name.startswith(prefix) for name in self.names)
        self.prefix = prefix

    def _locate(self, name: str) -> str:
        if self.bare:
            name = name.removeprefix(self.prefix)
        if name not in self.names:
            raise FormatError(f"the checkpoint has no tensor {name!r}")
        self.taken.add(name)
        return name

    def vector(self, name: str, size: int) -> Tensor:
        found = self._locate(name)
        self._check(found, (size,))
        return self.source.tensor(found)

    def matrix(self, name: str, rows: int, columns: int, *, transposed: bool) -> Matrix:
        found = self._locate(name)
        self._check(found, (columns, rows) if transposed else (rows, columns))
        if transposed:
            return self.source.tensor(found).T
        blocks = self.source.quantised(found)
        return self.source.tensor(found) if blocks is None else blocks

    def _check(self, name: str, expected: tuple[int, ...]) -> None:
        got = tuple(self.source.shape(name))
        if got != expected:
            raise FormatError(f"tensor {name!r} has shape {got}; the config asks for {expected}")

    def finish(self, unused: re.Pattern[str], tied_head: bool) -> None:
        left = [name for name in self.names if name not in self.taken and not unused.fullmatch(name)]
        # A tied head is often stored a second time.
        left = [name for name in left if not (tied_head and name == "lm_head.weight")]
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise FormatError(f"the checkpoint has tensors that the model does not: {', '.join(left[:5])}{more}")


@torch.no_grad()
def load_weights(model: LanguageModel, table: WeightTable, source: TensorSource) -> None:
    """Fill every module of `model` from `source`.

    Raises:
        FormatError: a tensor is missing, has another shape than the config asks for, or belongs to no module.
    """
    reader = _Reader(source, table)
    modules = dict(model.named_modules())
    for entry in table.entries:
        module = modules[entry.module]
        if isinstance(module, Projection):
            _fill_projection(module, entry, reader)
        elif isinstance(module, ExpertProjection):
            sizes = list(zip(entry.names, module.out_sizes, strict=True))
            module.fill(
                _Experts([(name + ".weight", size, module.in_size) for name, size in sizes], module.num_experts, reader)
            )
        elif isinstance(module, Embedding):
            module.fill(reader.matrix(entry.names[0] + ".weight", module.num_rows, module.size, transposed=False))
        elif isinstance(module, RMSNorm | LayerNorm):
            _fill_norm(module, entry.names[0], reader)
        elif isinstance(module, ChoiceBias):
            module.weight.copy_(reader.vector(entry.names[0], module.weight.shape[0]))
        else:
            raise InputError(f"{entry.module} is a {type(module).__name__}, which holds no weights", field="table")
    reader.finish(table.unused, model.tied)
    tie(model)


def tie(model: LanguageModel) -> None:
    """Give a tied head that is only packed the embedding's table; where it packs to the same numbers, one memory serves
    both."""
    if not model.tied or model.head.weight is not None:
        return
    table = model.embedding.table()
    if isinstance(table, PackedWeight):
        model.head.share(table)
        return
    model.head.fill([table])
    if not model.head.packed().quantised:
        model.embedding.share(model.head.packed())


def _fill_projection(module: Projection, entry: Entry, reader: _Reader) -> None:
    sizes = (sum(module.out_sizes),) if entry.whole else module.out_sizes
    named = list(zip(entry.names, sizes, strict=True))
    parts = [reader.matrix(n + ".weight", size, module.in_size, transposed=entry.transposed) for n, size in named]
    if entry.whole:
        parts = list(plain(parts[0]).split(list(module.out_sizes)))
    module.fill(parts)
    if module.bias is not None:
        module.bias.copy_(torch.cat([reader.vector(name + ".bias", size) for name, size in named]))


def _fill_norm(module: RMSNorm | LayerNorm, name: str, reader: _Reader) -> None:
    size = module.weight.shape[0]
    module.weight.copy_(reader.vector(name + ".weight", size))
    if isinstance(module, LayerNorm):
        module.bias.copy_(reader.vector(name + ".bias", size))


class _Experts(Sequence[Sequence[Matrix]]):
    """The matrices of one expert at a time, so that a large mixture is never held twice."""

    def __init__(self, parts: list[tuple[str, int, int]], num_experts: int, reader: _Reader) -> None:
        self.parts, self.num_experts, self.reader = parts, num_experts, reader

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: Any) -> Any:
        if expert >= self.num_experts:
            raise IndexError(expert)
        return [
            self.reader.matrix(name.format(expert), rows, columns, transposed=False)
            for name, rows, columns in self.parts
        ]


@torch.no_grad()
def save_weights(model: LanguageModel, table: WeightTable, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's tensors by Hugging Face name, in the order of the table; a tied head is left out.

    Args:
        dtype: of every tensor; None keeps the type each is stored in. What is only packed comes out as the float32 values
            that it stands for.
    """
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    for entry in table.entries:
        for name, tensor in _tensors(modules[entry.module], entry):
            tensors[name] = tensor.to(dtype or tensor.dtype).contiguous()
    return tensors


def _tensors(module: nn.Module, entry: Entry) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, ExpertProjection):
        for expert, parts in enumerate(module.parts()):
            for name, part in zip(entry.names, parts, strict=True):
                yield name.format(expert) + ".weight", part
    elif isinstance(module, Projection):
        parts = [torch.cat(module.parts())] if entry.whole else module.parts()
        for name, part in zip(entry.names, parts, strict=True):
            yield name + ".weight", part.T if entry.transposed else part
        if module.bias is not None:
            sizes = [sum(module.out_sizes)] if entry.whole else list(module.out_sizes)
            for name, bias in zip(entry.names, module.bias.detach().split(sizes), strict=True):
                yield name + ".bias", bias
    elif isinstance(module, ChoiceBias):
        yield entry.names[0], module.weight
    elif isinstance(module, Embedding):
        table = module.table()
        yield entry.names[0] + ".weight", unpack(table) if isinstance(table, PackedWeight) else table
    elif isinstance(module, RMSNorm | LayerNorm):
        yield entry.names[0] + ".weight", module.weight.detach()
        if isinstance(module, LayerNorm):
            yield entry.names[0] + ".bias", module.bias.detach()
