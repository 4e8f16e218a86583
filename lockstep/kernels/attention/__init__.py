"""Causal attention through a paged key-value cache: the one kernel of decoding, chunked prefill and training.

A query's bits depend on the query and on the keys it may see, at their positions: not on the batch, the chunk it came in,
the pages its keys lie in, or the number of threads. A cache of codes (int8, int4) keeps this: a token's codes are its own.
Legend: T packed tokens, H query heads, G kv heads, D head dim, S sequences, P pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.core.batch import ForwardBatch, SharedRows
from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels import native
from lockstep.kernels.attention import cpu, naive
from lockstep.kernels.attention.cache import KV_DTYPES, KVCache, LayerCache
from lockstep.kernels.attention.codes import INT4
from lockstep.kernels.gpu import Later

__all__ = ["INT4", "KV_DTYPES", "KVCache", "LayerCache", "attention"]

IMPLEMENTATIONS: dict[str, Any] = {
    "naive": naive,
    "cpu": cpu,
    "opaque": naive,
    "triton": Later("lockstep.kernels.attention.triton"),
}


def attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    batch: ForwardBatch,
    cache: LayerCache | None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    kv_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Write this step's keys and values, then let every query attend to the keys of its sequence up to its own position.

    Args:
        q_THD, k_TGD, v_TGD: after the rotary embedding; H is a multiple of G. Views whose heads lie side by side are
            read in place.
        cache: pages of this layer. None: training; the sequences are whole, a pool of `kv_dtype` is made for the call and
            the result is differentiable with respect to q, k, v and sinks.
        scale: of the scores, usually D^-0.5.
        window: a query sees the last `window` keys, its own included; 0: all.
        softcap: scores become softcap · tanh(score / softcap); 0: they do not.
        sinks_H: logits that join the softmax's denominator (Xiao et al. 2023).
        kv_dtype: without a cache, the dtype keys and values are rounded to, as the engine's cache would.

    Returns:
        [T, H, D] float32.

    Raises:
        InputError: shapes that do not fit, a page outside the cache, or without a cache a sequence that is not whole.
    """
    _check(q_THD, k_TGD, v_TGD, batch, cache, sinks_H)
    rule = naive.Rule(scale, window, softcap)
    if batch.shared is not None:
        return _shared(q_THD, k_TGD, v_TGD, batch.shared, cache, rule, sinks_H, kv_dtype)
    implementation = IMPLEMENTATIONS[native.choose(q_THD, has_triton=True)]
    if cache is None:
        _check_whole(batch, kv_dtype)
        return implementation.packed(q_THD, k_TGD, v_TGD, batch, kv_dtype, rule, sinks_H)
    return implementation.paged(q_THD, k_TGD, v_TGD, batch, cache, rule, sinks_H)


def _shared(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    shared: SharedRows,
    cache: LayerCache | None,
    rule: naive.Rule,
    sinks_H: Tensor | None,
    kv_dtype: torch.dtype,
) -> Tensor:
    """Compiled, each row is asked about once. Else attention on the sequences laid out whole, and each row's answer from one
    of them."""
    if cache is not None:
        raise InputError("rows that sequences share are for training steps; with a cache expected none", field="batch")
    if native.choose(q_THD, has_triton=True) == "cpu" and cpu.is_short(shared.whole, sinks_H):
        _check_whole(shared.whole, kv_dtype)
        return cpu.packed(q_THD, k_TGD, v_TGD, shared.whole, kv_dtype, rule, None, shared)
    mixed_XHD = attention(
        q_THD.index_select(0, shared.reads_X),
        k_TGD.index_select(0, shared.reads_X),
        v_TGD.index_select(0, shared.reads_X),
        shared.whole,
        None,
        scale=rule.scale,
        window=rule.window,
        softcap=rule.softcap,
        sinks_H=sinks_H,
        kv_dtype=kv_dtype,
    )
    return mixed_XHD.index_select(0, shared.places_T)


def _check(
    q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch, cache: LayerCache | None, sinks_H: Tensor | None
) -> None:
    shape, kv_shape = q.shape, k.shape
    if (
        len(shape) != 3
        or len(kv_shape) != 3
        or kv_shape != v.shape
        or shape[0] != kv_shape[0]
        or shape[2] != kv_shape[2]
    ):
        raise InputError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected [T, H, D] and twice [T, G, D]",
            field="q",
        )
    if q.dtype is not k.dtype or q.dtype is not v.dtype:
        raise InputError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one dtype, float32", field="q")
    if shape[1] % kv_shape[1]:
        raise InputError(f"{shape[1]} query heads; expected a multiple of the {kv_shape[1]} kv heads", field="q")
    if sinks_H is not None and sinks_H.shape != shape[1:2]:
        raise InputError(f"sinks are {tuple(sinks_H.shape)}; expected [{shape[1]}]", field="sinks")
    if shape[0] != len(batch.tokens_T):
        raise InputError(f"q has {shape[0]} tokens; the batch has {len(batch.tokens_T)}", field="q")
    if cache is not None and (cache.kv_heads, cache.head_dim) != kv_shape[1:]:
        raise InputError(
            f"the cache holds {(cache.kv_heads, cache.head_dim)} (kv heads, head dim); k has {tuple(kv_shape[1:])}",
            field="cache",
        )


def _check_whole(batch: ForwardBatch, kv_dtype: torch.dtype) -> None:
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"kv_dtype is {kv_dtype}; expected one of {', '.join(map(str, KV_DTYPES))}")
    if not torch.equal(batch.seq_starts[1:] - batch.seq_starts[:-1], batch.context_lens):
        raise InputError(
            f"without a cache a sequence is whole; rows {batch.seq_starts.diff().tolist()} against contexts "
            f"{batch.context_lens.tolist()}",
            field="batch",
        )
