"""What every language model is to the trainer and to the engine.

Legend: T packed tokens, R rows wanted, E model width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.core.batch import ForwardBatch
from lockstep.kernels.attention import KVCache
from lockstep.kernels.logprobs import soft_cap
from lockstep.layers.embedding import Embedding
from lockstep.layers.projection import Precision, Projection
from lockstep.layers.stack import DecoderLayers


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes that the engine plans with."""

    family: str
    vocab_size: int
    width: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    """Positions that a sequence may have."""


class LanguageModel(nn.Module, ABC):
    """A decoder: packed tokens in, hidden states out, logits of the rows that are wanted.

    `forward` is one definition for training (cache None) and serving; a token's hidden state has the same bits in both,
    however its sequence was cut into steps and whatever else is in the batch.
    """

    config: Any
    """The family's own, which its table of tensor names is made from."""

    def __init__(
        self,
        facts: ModelFacts,
        precision: Precision,
        *,
        embedding: Embedding,
        head: Projection,
        tied: bool,
        final_softcap: float = 0.0,
    ) -> None:
        super().__init__()
        self.facts = facts
        self.precision = precision
        self.embedding = embedding
        self.head = head
        """The output matrix; losses that never hold [R, V] whole read it."""
        self.tied = tied
        """The head's weight is the embedding's."""
        self.final_softcap = final_softcap
        """logits = c tanh(head(hidden) / c) with this c; 0: head(hidden)."""
        self.recompute = False
        if tied and embedding.weight is not None:
            head.weight = embedding.weight

    @abstractmethod
    def forward(self, batch: ForwardBatch, cache: KVCache | None) -> Tensor:
        """Hidden states [T, E] float32 after the final norm; writes the step's keys and values into `cache`."""

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """[R, V] float32 of the raw model: capped where the family does, no temperature."""
        logits_RV: Tensor = self.head(hidden_RE)
        return soft_cap(logits_RV, self.final_softcap)

    def recompute_layers(self, on: bool = True) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again: less memory, the same bits."""
        self.recompute = on
        for module in self.modules():
            if isinstance(module, DecoderLayers):
                module.recompute = on

    def new_cache(self, num_pages: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty pool of `num_pages` pages for every layer; by default of the type that training rounds to, which is
        what makes the learner's and the engine's numbers equal."""
        facts, dtype = self.facts, dtype or self.precision.kv_dtype
        return KVCache.allocate(facts.num_layers, num_pages, facts.num_kv_heads, facts.head_dim, dtype)

    @property
    def vocab_size(self) -> int:
        return self.facts.vocab_size

    @property
    def num_layers(self) -> int:
        return self.facts.num_layers

    @property
    def num_kv_heads(self) -> int:
        return self.facts.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.facts.head_dim

    @property
    def max_context(self) -> int:
        return self.facts.max_context
