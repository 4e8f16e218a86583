"""What a model effectively computes with, as a digest: two processes that serve the same numbers have the same one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lockstep.core.digest import effective_digest, tensors_digest
from lockstep.kernels.packed_linear import PackedWeight
from lockstep.layers.embedding import Embedding
from lockstep.layers.low_rank import Adapter
from lockstep.layers.moe import ExpertProjection
from lockstep.layers.projection import Projection
from lockstep.models.language import LanguageModel


def weights_digest(model: nn.Module, adapter: Adapter | None = None) -> str:
    """Digest of the effective weights: matrices as products read them, rounded or quantised, embeddings as rows are looked
    up, norms and biases in float32; with an adapter, of both together. So a learner with float32 masters that computes in
    bf16 and a server that holds bf16 only agree.

    Raises:
        InputError: the model holds no weights yet.
    """
    base = tensors_digest(_effective(model))
    return base if adapter is None else effective_digest(base, adapter_digest(adapter))


def adapter_digest(adapter: Adapter) -> str:
    """Digest of an adapter alone: its tensors and scales."""
    scales = torch.tensor([pair.scale for pair in adapter], dtype=torch.float64)
    return tensors_digest([("scales", scales), *adapter.tensors().items()])


def _effective(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if isinstance(module, Projection | ExpertProjection):
            packs = module.packs() if isinstance(module, Projection) else module.packed()
            for index, packed in enumerate(packs):
                yield f"{path}.{index}.spec", packed.spec
                yield f"{path}.{index}", packed.data
            if isinstance(module, Projection) and module.bias is not None:
                yield f"{path}.bias", module.bias
        elif isinstance(module, Embedding):
            if not (isinstance(model, LanguageModel) and module is model.embedding and _told_by_head(model)):
                yield from _table(path, module)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{name}", parameter


def _told_by_head(model: LanguageModel) -> bool:
    """The head's matrix is the embedding's table, rounded alike."""
    return model.tied and (isinstance(model.embedding.table(), PackedWeight) or not model.head.packs()[0].quantised)


def _table(path: str, module: Embedding) -> Iterator[tuple[str, Tensor]]:
    table = module.table()
    if isinstance(table, PackedWeight):
        yield f"{path}.spec", table.spec
        yield path, table.data
        return
    yield path, table if module.precision.compute == "fp32" else table.to(torch.bfloat16)
