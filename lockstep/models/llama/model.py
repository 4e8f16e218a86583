"""The Llama decoder (Touvron et al. 2023): RMS norm before each half, rotary grouped attention, a gated feed-forward.

Legend: T packed tokens, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from lockstep.core.batch import ForwardBatch
from lockstep.kernels.attention import KVCache, LayerCache
from lockstep.layers.attention import Angles, Attention, AttentionConfig
from lockstep.layers.embedding import Embedding
from lockstep.layers.gated import GatedKind, GatedMLP
from lockstep.layers.projection import Precision, Projection
from lockstep.layers.rotary import RopeConfig, RotaryTable
from lockstep.layers.token_norm import RMSNorm
from lockstep.models.language import LanguageModel, ModelFacts, longest_context


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and switches of one model."""

    vocab_size: int
    width: int
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    activation: GatedKind = "silu"
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    window: int = 0
    """Keys a query sees in every layer (Mistral); 0: all."""

    def attention(self) -> AttentionConfig:
        """Of every layer."""
        return AttentionConfig(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            window=self.window,
        )


class LlamaLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The sum is handed on as two terms, added inside the next norm."""

    def __init__(self, config: LlamaConfig, precision: Precision) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config.attention(), precision)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config.width, config.hidden, config.activation, precision, bias=config.mlp_bias)

    def forward(
        self, x_TE: Tensor, residual_TE: Tensor | None, batch: ForwardBatch, angles: Angles, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) -> (x, residual); the layer's input and output are their sums."""
        if residual_TE is None:
            residual_TE, normed_TE = x_TE, self.attention_norm(x_TE)
        else:
            normed_TE, residual_TE = self.attention_norm.after_add(x_TE, residual_TE)
        x_TE = self.attention(normed_TE, batch, angles, cache)
        normed_TE, residual_TE = self.mlp_norm.after_add(x_TE, residual_TE)
        return self.mlp(normed_TE), residual_TE


class Llama(LanguageModel):
    """Embedding, layers, final norm, head."""

    def __init__(self, config: LlamaConfig, precision: Precision) -> None:
        super().__init__(
            ModelFacts(
                family="llama",
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
        self.layers = nn.ModuleList([LlamaLayer(config, precision) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.rotary = RotaryTable(config.rope, config.head_dim, config.max_context)

    def forward(self, batch: ForwardBatch, cache: KVCache | None) -> Tensor:
        """See `LanguageModel.forward`."""
        angles = self.rotary.reach(longest_context(batch))
        x_TE, residual_TE = self.embedding(batch.tokens_T), None
        for index, layer in enumerate(self.layers):
            x_TE, residual_TE = layer(x_TE, residual_TE, batch, angles, cache.layers[index] if cache else None)
        assert residual_TE is not None
        hidden_TE, _ = self.norm.after_add(x_TE, residual_TE)
        return hidden_TE
