"""The Qwen3 mixture of experts (Yang et al. 2025): some layers keep a plain gated feed-forward.

Legend: T packed tokens, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.kernels.attention import KVCache
from lockstep.layers.attention import AttentionConfig
from lockstep.layers.decoder import PreNormLayer
from lockstep.layers.embedding import Embedding
from lockstep.layers.gated import GatedKind, GatedMLP
from lockstep.layers.moe import SparseMLP
from lockstep.layers.projection import Precision, Projection
from lockstep.layers.rotary import RopeConfig, RotaryTable
from lockstep.layers.stack import DecoderLayers
from lockstep.layers.token_norm import RMSNorm
from lockstep.models.language import LanguageModel, ModelFacts


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig:
    """Sizes and switches of one model."""

    vocab_size: int
    width: int
    hidden: int
    """Of the layers without experts."""
    expert_hidden: int
    num_experts: int
    num_chosen: int
    """Experts a token takes."""
    normalise: bool
    """The shares of the chosen experts are divided by their sum."""
    sparse: tuple[bool, ...]
    """Which layers have experts."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    activation: GatedKind = "silu"
    tied: bool = False
    attention_bias: bool = False
    window: int = 0
    """Keys a query sees in every layer; 0: all."""

    def attention(self) -> AttentionConfig:
        """Of every layer."""
        return AttentionConfig(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            qkv_bias=self.attention_bias,
            out_bias=self.attention_bias,
            qk_norm_eps=self.norm_eps,
            window=self.window,
        )


class Qwen3Moe(LanguageModel):
    """Embedding, layers, final norm, head."""

    def __init__(self, config: Qwen3MoeConfig, precision: Precision) -> None:
        super().__init__(
            ModelFacts(
                family="qwen3_moe",
                vocab_size=config.vocab_size,
                width=config.width,
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_context=config.max_context,
            ),
            precision,
            embedding=Embedding(config.vocab_size, config.width, precision),
            head=Projection(config.width, (config.vocab_size,), precision),
            tied=config.tied,
        )
        self.config = config
        self.layers = DecoderLayers([self._layer(config, index, precision) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.rotary = RotaryTable(config.rope, config.head_dim, config.max_context)

    @staticmethod
    def _layer(config: Qwen3MoeConfig, index: int, precision: Precision) -> PreNormLayer:
        mlp: GatedMLP | SparseMLP
        if config.sparse[index]:
            mlp = SparseMLP(
                config.width,
                config.expert_hidden,
                config.num_experts,
                config.num_chosen,
                config.activation,
                precision,
                normalise=config.normalise,
            )
        else:
            mlp = GatedMLP(config.width, config.hidden, config.activation, precision)
        return PreNormLayer(config.attention(), mlp, config.norm_eps, precision)

    def forward(self, batch: ForwardBatch, cache: KVCache | None) -> Tensor:
        """See `LanguageModel.forward`."""
        angles = [self.rotary.reach(batch.longest)] * self.num_layers
        return self.layers.run(self.embedding(batch.tokens_T), self.norm, batch, angles, cache)
