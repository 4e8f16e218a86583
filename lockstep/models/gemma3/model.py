"""The Gemma 3 text decoder (Kamath et al. 2025): Gemma 2 with a norm on queries and keys and two rotations, a fast one in
layers with a window and a slow one in the others.

Legend: T packed tokens, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.kernels.attention import KVCache
from lockstep.layers.attention import AttentionConfig
from lockstep.layers.decoder import SandwichLayer
from lockstep.layers.embedding import Embedding, embedding_scale
from lockstep.layers.gated import GatedKind, GatedMLP
from lockstep.layers.projection import Precision, Projection
from lockstep.layers.rotary import RopeConfig, RotaryTable
from lockstep.layers.stack import DecoderLayers
from lockstep.layers.token_norm import RMSNorm
from lockstep.models.language import LanguageModel, ModelFacts


@dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """Sizes and switches of one model."""

    vocab_size: int
    width: int
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    score_scale: float
    """Factor on attention scores."""
    final_softcap: float
    norm_eps: float = 1e-6
    rope: RopeConfig
    """Of the layers that see all keys."""
    local_rope: RopeConfig
    """Of the layers with a window."""
    activation: GatedKind = "gelu_tanh"
    tied: bool = True
    windows: tuple[int, ...]
    """For each layer, keys a query sees; 0: all."""

    def attention(self, layer: int) -> AttentionConfig:
        """Of one layer."""
        return AttentionConfig(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.score_scale,
            qk_norm_eps=self.norm_eps,
            qk_norm_offset=1.0,
            window=self.windows[layer],
        )


class Gemma3(LanguageModel):
    """Embedding, layers, final norm, head."""

    def __init__(self, config: Gemma3Config, precision: Precision) -> None:
        super().__init__(
            ModelFacts(
                family="gemma3",
                vocab_size=config.vocab_size,
                width=config.width,
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_context=config.max_context,
            ),
            precision,
            embedding=Embedding(
                config.vocab_size, config.width, precision, scale=embedding_scale(config.width, precision)
            ),
            head=Projection(config.width, (config.vocab_size,), precision),
            tied=config.tied,
            final_softcap=config.final_softcap,
        )
        self.config = config
        self.layers = DecoderLayers([self._layer(config, index, precision) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.width, config.norm_eps, offset=1.0)
        self.rotary = RotaryTable(config.rope, config.head_dim, config.max_context)
        self.local_rotary = RotaryTable(config.local_rope, config.head_dim, config.max_context)

    @staticmethod
    def _layer(config: Gemma3Config, index: int, precision: Precision) -> SandwichLayer:
        mlp = GatedMLP(config.width, config.hidden, config.activation, precision)
        return SandwichLayer(config.attention(index), mlp, config.norm_eps, precision)

    def forward(self, batch: ForwardBatch, cache: KVCache | None) -> Tensor:
        """See `LanguageModel.forward`."""
        length = batch.longest
        angles, local_angles = self.rotary.reach(length), self.local_rotary.reach(length)
        here = [local_angles if window else angles for window in self.config.windows]
        return self.layers.run(self.embedding(batch.tokens_T), self.norm, batch, here, cache)
