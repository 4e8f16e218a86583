"""DeepSeek-V3 (2024): latent attention; after a few dense layers, group-limited experts beside shared ones.

The extra layers that predict further tokens ahead are not part of the model here.

Legend: T packed tokens, E model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.kernels.attention import KVCache
from lockstep.layers.decoder import PreNormLayer
from lockstep.layers.embedding import Embedding
from lockstep.layers.gated import GatedKind, GatedMLP
from lockstep.layers.latent import LatentConfig
from lockstep.layers.moe import GroupedSparseMLP, GroupRule
from lockstep.layers.projection import Precision, Projection
from lockstep.layers.rotary import RopeConfig, RotaryTable
from lockstep.layers.stack import DecoderLayers
from lockstep.layers.token_norm import RMSNorm
from lockstep.models.language import LanguageModel, ModelFacts


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config:
    """Sizes and switches of one model."""

    vocab_size: int
    width: int
    hidden: int
    """Of the layers without experts."""
    expert_hidden: int
    num_shared: int
    """Experts that every token takes; they are one feed-forward of that many times the width."""
    rule: GroupRule
    num_layers: int
    num_dense: int
    """The first layers, which have no experts."""
    num_heads: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int
    kv_rank: int
    max_context: int
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    interleaved: bool = True
    activation: GatedKind = "silu"
    tied: bool = False
    attention_bias: bool = False

    def attention(self) -> LatentConfig:
        """Of every layer. Scores of stretched positions are sharpened (YaRN, Peng et al. 2023)."""
        scale = (self.plain_dim + self.rope_dim) ** -0.5
        if self.rope.kind != "default" and self.rope.mscale_all_dim and self.rope.factor > 1:
            scale *= (0.1 * self.rope.mscale_all_dim * math.log(self.rope.factor) + 1.0) ** 2
        return LatentConfig(
            width=self.width,
            num_heads=self.num_heads,
            plain_dim=self.plain_dim,
            rope_dim=self.rope_dim,
            value_dim=self.value_dim,
            q_rank=self.q_rank,
            kv_rank=self.kv_rank,
            scale=scale,
            interleaved=self.interleaved,
            bias=self.attention_bias,
        )


class DeepseekV3(LanguageModel):
    """Embedding, layers, final norm, head."""

    def __init__(self, config: DeepseekV3Config, precision: Precision) -> None:
        attention = config.attention()
        super().__init__(
            ModelFacts(
                family="deepseek_v3",
                vocab_size=config.vocab_size,
                width=config.width,
                num_layers=config.num_layers,
                num_kv_heads=config.num_heads,
                head_dim=attention.head_dim,
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
        self.rotary = RotaryTable(config.rope, config.rope_dim, config.max_context)

    @staticmethod
    def _layer(config: DeepseekV3Config, index: int, precision: Precision) -> PreNormLayer:
        mlp: GatedMLP | GroupedSparseMLP
        if index < config.num_dense:
            mlp = GatedMLP(config.width, config.hidden, config.activation, precision)
        else:
            shared = config.num_shared * config.expert_hidden
            mlp = GroupedSparseMLP(
                config.width, config.expert_hidden, shared, config.rule, config.activation, precision
            )
        return PreNormLayer(config.attention(), mlp, config.norm_eps, precision)

    def forward(self, batch: ForwardBatch, cache: KVCache | None) -> Tensor:
        """See `LanguageModel.forward`."""
        angles = [self.rotary.reach(batch.longest)] * self.num_layers
        return self.layers.run(self.embedding(batch.tokens_T), self.norm, batch, angles, cache)
