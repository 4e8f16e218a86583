"""Self-attention of one decoder layer over the paged cache, and the facts about a step that every layer shares.

Legend: T packed tokens, E model width, H query heads, G kv heads, D head dim, P positions, R rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import ConfigError
from lockstep.kernels.attention import LayerCache, attention
from lockstep.kernels.rope import rope
from lockstep.layers.projection import Precision, Projection
from lockstep.layers.rotary import Angles
from lockstep.layers.token_norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What distinguishes the attention of one layer from another's."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Factor on the scores; 1 / sqrt(head_dim) in most families."""
    qkv_bias: bool = False
    out_bias: bool = False
    window: int = 0
    """Keys a query sees, itself included; 0: all before it."""
    softcap: float = 0.0
    """s -> c tanh(s / c) on the scores; 0: none."""
    qk_norm_eps: float | None = None
    """RMS norm of every query and key head before the rotation; None: none."""
    qk_norm_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every kv head serves the same number of query heads"
            )


class Attention(nn.Module):
    """Causal attention with grouped kv heads; q, k and v are one matrix."""

    def __init__(self, config: AttentionConfig, precision: Precision) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.config = config
        self.kv_dtype = precision.kv_dtype
        self.heads = [heads, kv_heads, kv_heads]
        sizes = [num * dim for num in self.heads]
        self.qkv = Projection(config.width, sizes, precision, bias=config.qkv_bias)
        self.out = Projection(heads * dim, (config.width,), precision, bias=config.out_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm_eps is not None:
            eps, offset = config.qk_norm_eps, config.qk_norm_offset
            self.q_norm = RMSNorm(dim, eps, offset=offset)
            self.k_norm = RMSNorm(dim, eps, offset=offset)

    def forward(self, x_TE: Tensor, batch: ForwardBatch, angles: Angles | None, cache: LayerCache | None) -> Tensor:
        """x [T, E] -> [T, E]; writes this step's keys and values into `cache`. Without angles nothing is rotated."""
        config = self.config
        heads = self.qkv(x_TE, batch.adapters).view(x_TE.shape[0], -1, config.head_dim)
        q_THD, k_TGD, v_TGD = heads.split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TGD = self.q_norm(q_THD), self.k_norm(k_TGD)
        if angles is not None:
            cos_PR, sin_PR = angles
            q_THD = rope(q_THD, batch.positions_T, cos_PR, sin_PR)
            k_TGD = rope(k_TGD, batch.positions_T, cos_PR, sin_PR)
        mixed_THD = attention(
            q_THD,
            k_TGD,
            v_TGD,
            batch,
            cache,
            scale=config.scale,
            window=config.window,
            softcap=config.softcap,
            kv_dtype=self.kv_dtype,
        )
        return self.out(mixed_THD.flatten(1), batch.adapters)
