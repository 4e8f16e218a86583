"""The decoder layer that most families share, and the sum it hands on.

Legend: T packed tokens, E model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from lockstep.core.batch import ForwardBatch
from lockstep.kernels.attention import LayerCache
from lockstep.layers.attention import Attention, AttentionConfig
from lockstep.layers.latent import LatentAttention, LatentConfig
from lockstep.layers.projection import Precision
from lockstep.layers.rotary import Angles
from lockstep.layers.token_norm import RMSNorm

Stream = tuple[Tensor, Tensor | None]
"""(x, residual), both [T, E], whose sum is the hidden state; it is added inside the next norm. None: nothing to add."""


class PreNormLayer(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); any feed-forward that maps [T, E] and the rows' adapters to [T, E]."""

    def __init__(
        self, attention: AttentionConfig | LatentConfig, mlp: nn.Module, norm_eps: float, precision: Precision
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(attention.width, norm_eps)
        self.attention: Attention | LatentAttention
        if isinstance(attention, LatentConfig):
            self.attention = LatentAttention(attention, precision)
        else:
            self.attention = Attention(attention, precision)
        self.mlp_norm = RMSNorm(attention.width, norm_eps)
        self.mlp = mlp

    def forward(self, stream: Stream, batch: ForwardBatch, angles: Angles, cache: LayerCache | None) -> Stream:
        """The hidden state before the layer -> after it; writes this step's keys and values into `cache`."""
        normed_TE, residual_TE = open_stream(stream, self.attention_norm)
        x_TE = self.attention(normed_TE, batch, angles, cache)
        normed_TE, residual_TE = self.mlp_norm.after_add(x_TE, residual_TE)
        return self.mlp(normed_TE, batch.adapters), residual_TE


class SandwichLayer(nn.Module):
    """h + norm(attention(norm(h))), then h + norm(mlp(norm(h))): Gemma's, whose norm weights are stored minus one."""

    def __init__(self, attention: AttentionConfig, mlp: nn.Module, norm_eps: float, precision: Precision) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(attention.width, norm_eps, offset=1.0)
        self.attention = Attention(attention, precision)
        self.attention_out_norm = RMSNorm(attention.width, norm_eps, offset=1.0)
        self.mlp_norm = RMSNorm(attention.width, norm_eps, offset=1.0)
        self.mlp = mlp
        self.mlp_out_norm = RMSNorm(attention.width, norm_eps, offset=1.0)

    def forward(self, stream: Stream, batch: ForwardBatch, angles: Angles, cache: LayerCache | None) -> Stream:
        """See `PreNormLayer.forward`."""
        normed_TE, residual_TE = open_stream(stream, self.attention_norm)
        x_TE = self.attention_out_norm(self.attention(normed_TE, batch, angles, cache))
        normed_TE, residual_TE = self.mlp_norm.after_add(x_TE, residual_TE)
        return self.mlp_out_norm(self.mlp(normed_TE, batch.adapters)), residual_TE


def open_stream(stream: Stream, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """(norm of the hidden state, hidden state)."""
    x_TE, residual_TE = stream
    if residual_TE is None:
        return norm(x_TE), x_TE
    return norm.after_add(x_TE, residual_TE)
