"""Low-rank adapters of a language model: which matrices can have one, making one, and melting one into the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.layers.low_rank import Adapter, AdapterSlot, LowRank, name_matrices
from lockstep.layers.moe import ExpertProjection
from lockstep.layers.projection import Projection
from lockstep.models.families import table_of
from lockstep.models.language import LanguageModel

ALL_TARGETS = ("qkv", "out", "gate_up", "up", "down")
"""The matrices of attention and feed-forward, experts included; a family lacks some of them."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter (Hu et al. 2021). No dropout: the sampler's numbers would not be the trainer's.

    >>> LoraConfig(rank=8, targets=("q_proj", "v_proj")).alpha
    32.0
    """

    rank: int = 16
    alpha: float = 32.0
    """The pair's product is scaled by alpha / rank."""
    targets: tuple[str, ...] = ALL_TARGETS
    """Last words of names: ours (qkv, out, gate_up, up, down: all parts of that matrix) or those of the family's
    checkpoints (q_proj, c_attn, ...)."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank}; expected at least 1")
        if not self.targets:
            raise ConfigError(f"targets is empty; name matrices, such as {', '.join(ALL_TARGETS)}")


def adapter_slots(model: LanguageModel) -> list[AdapterSlot]:
    """Every matrix of the model that an adapter can change: all but embeddings, the head and routers."""
    modules = dict(model.named_modules())
    found: list[AdapterSlot] = []
    for entry in table_of(model).entries:
        module = modules[entry.module]
        if entry.module == "head" or entry.module.endswith(".router"):
            continue
        if not isinstance(module, Projection | ExpertProjection):
            continue
        sizes = (sum(module.out_sizes),) if entry.whole else module.out_sizes
        experts = range(module.num_experts) if isinstance(module, ExpertProjection) else [None]
        for expert in experts:
            first = 0
            for name, size in zip(entry.names, sizes, strict=True):
                path = entry.module if expert is None else f"{entry.module}.{expert}"
                found.append(AdapterSlot(name.format(expert), path, module.in_size, size, first))
                first += size
    return found


def new_adapter(model: LanguageModel, config: LoraConfig, generator: torch.Generator | None = None) -> Adapter:
    """An adapter that changes nothing yet: A random, B zero. Train `adapter.parameters()`; the model stays frozen.

    Use it by `ForwardBatch.packed(sequences, adapter)`; a batch without it is the base model, such as a KL reference.

    Args:
        generator: of A's numbers; None: seed 0.

    Raises:
        ConfigError: a target that the model has not.
    """
    name_matrices(model)
    slots = adapter_slots(model)
    known: dict[str, None] = {}
    for slot in slots:
        known |= dict.fromkeys(_words(slot))
    for target in config.targets:
        if target not in known and target not in ALL_TARGETS:
            raise ConfigError(unknown_name("adapter target", target, known))
    chosen = [slot for slot in slots if set(_words(slot)) & set(config.targets)]
    if not chosen:
        raise ConfigError(f"targets={config.targets} name no matrix of this model; it has {', '.join(known)}")
    stable = config.rank_stabilised
    pairs = [LowRank(slot, config.rank, config.alpha, rank_stabilised=stable) for slot in chosen]
    return Adapter(pairs, rank_stabilised=stable).reset(generator or torch.Generator().manual_seed(0))


@torch.no_grad()
def merge_adapter(model: LanguageModel, adapter: Adapter) -> None:
    """Adds the adapter to the model's own weights: W += scale * B A, rounded once to what W is stored in.

    Raises:
        ConfigError: int8 or int4 matrices, whose codes would be chosen anew; load the model in bf16 or fp32.
    """
    by_path: dict[str, list[LowRank]] = {}
    for pair in adapter:
        by_path.setdefault(pair.slot.path, []).append(pair)
    for path, module in model.named_modules():
        if isinstance(module, Projection) and path in by_path:
            _refuse_quantised(path, module)
            (whole,) = _added([torch.cat(module.parts())], [by_path[path]])
            module.fill(whole.split(list(module.out_sizes)))
        elif isinstance(module, ExpertProjection):
            pairs = [by_path.get(f"{path}.{expert}", []) for expert in range(module.num_experts)]
            if any(pairs):
                _refuse_quantised(path, module)
                wholes = _added([torch.cat(parts) for parts in module.parts()], pairs)
                module.fill([whole.split(list(module.out_sizes)) for whole in wholes])


def _added(wholes: list[Tensor], pairs: list[list[LowRank]]) -> Iterator[Tensor]:
    for whole, own in zip(wholes, pairs, strict=True):
        whole = whole.to(torch.float32, copy=True)
        for pair in own:
            slot = pair.slot
            whole[slot.first_column : slot.first_column + slot.out_size] += pair.delta()
        yield whole


def _refuse_quantised(path: str, module: Projection | ExpertProjection) -> None:
    packs = module.packs() if isinstance(module, Projection) else module.packed()
    if any(packed.quantised for packed in packs):
        raise ConfigError(f"{path} is quantised; an adapter is merged into bf16 or fp32 weights: load the model so")


def _words(slot: AdapterSlot) -> tuple[str, ...]:
    ours = [word for word in slot.path.split(".") if not word.isdigit()][-1]
    return ours, slot.name.rsplit(".", 1)[-1]
