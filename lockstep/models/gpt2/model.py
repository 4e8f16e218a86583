"""The GPT-2 decoder (Radford et al. 2019): learned positions, layer norms, every head with its own keys, a plain feed-forward.

Legend: T packed tokens, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import InputError
from lockstep.kernels.attention import KVCache, LayerCache
from lockstep.layers.attention import Attention, AttentionConfig
from lockstep.layers.embedding import Embedding
from lockstep.layers.gated import PlainKind, PlainMLP
from lockstep.layers.projection import Precision, Projection
from lockstep.layers.recompute import run_layer
from lockstep.layers.token_norm import LayerNorm
from lockstep.models.language import LanguageModel, ModelFacts


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Sizes and switches of one model."""

    vocab_size: int
    width: int
    hidden: int
    num_layers: int
    num_heads: int
    max_context: int
    norm_eps: float = 1e-5
    activation: PlainKind = "gelu_tanh"
    tied: bool = True
    scores_by_head_dim: bool = True
    """Scores are divided by the root of the head dim."""
    scores_by_layer: bool = False
    """Scores of layer i are divided by i + 1."""

    def attention(self, layer: int) -> AttentionConfig:
        """Of one layer."""
        head_dim = self.width // self.num_heads
        return AttentionConfig(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=head_dim,
            scale=(head_dim**-0.5 if self.scores_by_head_dim else 1.0) / (layer + 1 if self.scores_by_layer else 1),
            qkv_bias=True,
            out_bias=True,
        )


class GPT2Layer(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: GPT2Config, index: int, precision: Precision) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config.attention(index), precision)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = PlainMLP(config.width, config.hidden, config.activation, precision)

    def forward(self, x_TE: Tensor, batch: ForwardBatch, cache: LayerCache | None) -> Tensor:
        """x [T, E] -> [T, E]; writes this step's keys and values into `cache`."""
        x_TE = x_TE + self.attention(self.attention_norm(x_TE), batch, None, cache)
        return x_TE + self.mlp(self.mlp_norm(x_TE), batch.adapters)


class GPT2(LanguageModel):
    """Embeddings of tokens and positions, layers, final norm, head."""

    def __init__(self, config: GPT2Config, precision: Precision) -> None:
        super().__init__(
            ModelFacts(
                family="gpt2",
                vocab_size=config.vocab_size,
                width=config.width,
                num_layers=config.num_layers,
                num_kv_heads=config.num_heads,
                head_dim=config.width // config.num_heads,
                max_context=config.max_context,
            ),
            precision,
            embedding=Embedding(config.vocab_size, config.width, precision),
            head=Projection(config.width, (config.vocab_size,), precision),
            tied=config.tied,
        )
        self.config = config
        self.positions = Embedding(config.max_context, config.width, precision)
        self.layers = nn.ModuleList([GPT2Layer(config, index, precision) for index in range(config.num_layers)])
        self.norm = LayerNorm(config.width, config.norm_eps)

    def forward(self, batch: ForwardBatch, cache: KVCache | None) -> Tensor:
        """See `LanguageModel.forward`."""
        length = batch.longest
        if length > self.config.max_context:
            raise InputError(
                f"a sequence has {length} tokens; the model's context holds {self.config.max_context}",
                field="positions",
            )
        x_TE = self.embedding(batch.tokens_T) + self.positions(batch.positions_T)
        for index, layer in enumerate(self.layers):
            x_TE = run_layer(layer, self.recompute, x_TE, batch, cache.layers[index] if cache else None)
        return self.norm(x_TE)
