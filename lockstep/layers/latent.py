"""Multi-head latent attention (DeepSeek-V2, 2024): queries, and keys with values, come out of narrow latents.

The cache holds the keys and values of every head, not the latent they come from, so that the one attention kernel serves;
that is `2 * num_heads * head_dim` numbers a token where the latent has `kv_rank + rope_dim`.

Legend: T packed tokens, E model width, H heads, D head dim of queries and keys, V of values, R latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import ConfigError
from lockstep.kernels.attention import LayerCache, attention
from lockstep.kernels.rope import rope
from lockstep.layers.projection import Precision, Projection
from lockstep.layers.rotary import Angles
from lockstep.layers.token_norm import RMSNorm

NORM_EPS = 1e-6
"""Of the latents, whatever the model's other norms have."""


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Sizes of one layer's attention."""

    width: int
    num_heads: int
    plain_dim: int
    """Dimensions of a query or key that are not rotated."""
    rope_dim: int
    """Dimensions that are; all heads share those of the key."""
    value_dim: int
    q_rank: int
    """Width of the latent of the queries; 0: they come straight from the input."""
    kv_rank: int
    scale: float
    """Factor on the scores."""
    interleaved: bool = True
    """Rotated pairs are neighbours."""
    bias: bool = False
    """On the matrices from and to the model's width."""

    def __post_init__(self) -> None:
        if self.value_dim > self.head_dim:
            raise ConfigError(f"value_dim={self.value_dim} exceeds the {self.head_dim} dimensions of a key")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.plain_dim + self.rope_dim


class LatentAttention(nn.Module):
    """Causal attention out of latents."""

    def __init__(self, config: LatentConfig, precision: Precision) -> None:
        super().__init__()
        width, heads, queries = config.width, config.num_heads, config.num_heads * config.head_dim
        self.config = config
        self.kv_dtype = precision.kv_dtype
        self.q_down: Projection | None = None
        self.q_norm: RMSNorm | None = None
        if config.q_rank:
            self.q_down = Projection(width, (config.q_rank,), precision, bias=config.bias)
            self.q_norm = RMSNorm(config.q_rank, NORM_EPS)
        self.q_up = Projection(config.q_rank or width, (queries,), precision)
        self.kv_down = Projection(width, (config.kv_rank + config.rope_dim,), precision, bias=config.bias)
        self.kv_norm = RMSNorm(config.kv_rank, NORM_EPS)
        self.kv_up = Projection(config.kv_rank, (heads * (config.plain_dim + config.value_dim),), precision)
        self.out = Projection(heads * config.value_dim, (width,), precision, bias=config.bias)

    def forward(self, x_TE: Tensor, batch: ForwardBatch, angles: Angles | None, cache: LayerCache | None) -> Tensor:
        """x [T, E] -> [T, E]; writes this step's keys and values into `cache`."""
        config, num, adapters = self.config, x_TE.shape[0], batch.adapters
        assert angles is not None, "latent attention rotates"
        queries = x_TE
        if self.q_down is not None and self.q_norm is not None:
            queries = self.q_norm(self.q_down(x_TE, adapters))
        q_THD = self.q_up(queries, adapters).view(num, config.num_heads, config.head_dim)
        latent_TR, turned = self.kv_down(x_TE, adapters).split([config.kv_rank, config.rope_dim], dim=1)
        heads = self.kv_up(self.kv_norm(latent_TR.contiguous()), adapters).view(num, config.num_heads, -1)
        plain_k, v_THV = heads.split([config.plain_dim, config.value_dim], dim=2)
        plain_q, turned_q = q_THD.split([config.plain_dim, config.rope_dim], dim=2)
        turned_q = rope(turned_q.contiguous(), batch.positions_T, *angles, config.interleaved)
        turned_k = rope(turned.contiguous().unsqueeze(1), batch.positions_T, *angles, config.interleaved)
        mixed_THD = attention(
            torch.cat([plain_q, turned_q], dim=2),
            torch.cat([plain_k, turned_k.expand(-1, config.num_heads, -1)], dim=2),
            functional.pad(v_THV, (0, config.head_dim - config.value_dim)),
            batch,
            cache,
            scale=config.scale,
            kv_dtype=self.kv_dtype,
        )
        return self.out(mixed_THD[:, :, : config.value_dim].flatten(1), adapters)
