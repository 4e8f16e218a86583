"""Attention through the compiled kernel. The backward pass recomputes the weights with whole matrix products.

Legend: T packed tokens, H query heads, G kv heads, U query heads per kv head, D head dim, C queries of a chunk, N keys.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor

from lockstep.core.batch import ForwardBatch, SharedRows
from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.attention.cache import LayerCache
from lockstep.kernels.attention.codes import INT4
from lockstep.kernels.attention.naive import Rule, rounded

KV_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, INT4: 3}
"""LsKvDtype of csrc/language.h."""
_BACKWARD_QUERIES = 256

SHORT = 256
"""Tokens of the longest sequence of a batch whose gradient is one compiled call. Longer ones are matrix products."""


class _Call(ctypes.Structure):
    """LsAttention of csrc/language.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "k_pages", "v_pages", "k_scales", "v_scales")],
        *[(name, ctypes.c_void_p) for name in ("seq_starts", "context_lens", "pages", "sinks")],
        *[(name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride", "pages_stride")],
        *[
            (name, ctypes.c_int64)
            for name in ("num_tokens", "num_seqs", "num_heads", "kv_heads", "head_dim", "num_pages")
        ],
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in ("reads", "whole_starts")],
    ]


class _BackwardCall(ctypes.Structure):
    """LsAttentionBackward of csrc/language.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("q", "k", "v", "dout", "dq", "dk", "dv", "seq_starts")],
        *[(name, ctypes.c_int64) for name in ("q_stride", "num_seqs", "num_heads", "kv_heads", "head_dim", "window")],
        *[("scale", ctypes.c_float), ("softcap", ctypes.c_float)],
        *[(name, ctypes.c_void_p) for name in ("reads", "whole_starts")],
    ]


def _heads_together(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return x
    _, head, element = x.stride()
    return x if element == 1 and head == x.shape[2] else x.contiguous()


def paged(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    batch: ForwardBatch,
    cache: LayerCache,
    rule: Rule,
    sinks_H: Tensor | None,
    shared: SharedRows | None = None,
) -> Tensor:
    """Writes this step's keys and values, then attends. With `shared` the batch is `shared.whole` and the rows are fewer."""
    q, k, v = _heads_together(q_THD), _heads_together(k_TGD), _heads_together(v_TGD)
    num_tokens, num_heads, head_dim = q.shape
    starts, lengths, pages = batch.seq_starts, batch.context_lens, native.contiguous(batch.pages_SP)
    if shared is not None:
        starts = shared.seq_starts
    if not (starts.dtype is lengths.dtype is pages.dtype is torch.int32):
        raise InputError(
            f"seq_starts, context_lens and pages are {starts.dtype}, {lengths.dtype}, {pages.dtype}; expected int32",
            field="batch",
        )
    sinks = None if sinks_H is None else native.contiguous(sinks_H)
    out = torch.empty(num_tokens, num_heads, head_dim)
    call = _Call(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        None if cache.k_scale is None else cache.k_scale.data_ptr(),
        None if cache.v_scale is None else cache.v_scale.data_ptr(),
        starts.data_ptr(),
        lengths.data_ptr(),
        pages.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        pages.shape[1],
        num_tokens,
        lengths.shape[0],
        num_heads,
        k.shape[1],
        head_dim,
        cache.k.shape[0],
        rule.window,
        rule.scale,
        rule.softcap,
        KV_CODES[cache.dtype],
        0,
        *_shared_addresses(shared),
    )
    bad = native.lib().ls_attention(ctypes.addressof(call))
    if bad != -1:
        raise refused(batch, cache, bad)
    return out


def _shared_addresses(shared: SharedRows | None) -> tuple[int | None, int | None]:
    """`reads` and `whole_starts` of a call."""
    return (None, None) if shared is None else (shared.reads_X.data_ptr(), shared.whole.seq_starts.data_ptr())


def refused(batch: ForwardBatch, cache: LayerCache, code: int) -> InputError:
    if code >= 0:
        return InputError(
            f"sequence {code} of {int(batch.context_lens[code])} keys has pages {batch.pages_SP[code].tolist()}; expected "
            f"one of 0..{cache.num_pages - 1} for every 16 keys",
            field="pages",
        )
    rows = batch.seq_starts.tolist()
    return InputError(
        f"sequence {-2 - code} has rows {rows[-2 - code : -code]} and {int(batch.context_lens[-2 - code])} keys; expected "
        "rows that do not fall, at most as many as keys",
        field="seq_starts",
    )


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        batch: ForwardBatch,
        dtype: torch.dtype,
        rule: Rule,
        shared: SharedRows | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.facts = batch, dtype, rule, shared
        return _through_pool(q, k, v, batch, dtype, rule, sinks, shared)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        native.refuse_double_backward()
        q, k, v, sinks = ctx.saved_tensors
        batch, dtype, rule, shared = ctx.facts
        dq, dk, dv = torch.empty(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)
        if is_short(batch, sinks):
            _short_backward(q, rounded(k, dtype), rounded(v, dtype), grads[0], (dq, dk, dv), batch, rule, shared)
            return dq, dk, dv, *[None] * 5
        assert shared is None
        dsinks = None if sinks is None else torch.zeros(sinks.shape)
        for a, b in itertools.pairwise(batch.seq_starts.tolist()):
            rows = slice(a, b)
            key, value = rounded(k[rows], dtype), rounded(v[rows], dtype)
            dq[rows], dk[rows], dv[rows], part = _sequence_backward(q[rows], key, value, sinks, grads[0][rows], rule)
            if dsinks is not None and part is not None:
                dsinks += part
        return dq, dk, dv, dsinks, *[None] * 4


def is_short(batch: ForwardBatch, sinks_H: Tensor | None) -> bool:
    """Whether the gradient of whole sequences is one compiled call, which can have rows that sequences share."""
    return sinks_H is None and int(batch.context_lens.max()) <= SHORT


def _short_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
    batch: ForwardBatch,
    rule: Rule,
    shared: SharedRows | None,
) -> None:
    """Adds the gradients of all sequences to dk and dv, which are zeros, and writes dq, in one compiled call."""
    q, k, v, dout = _heads_together(q), k.contiguous(), v.contiguous(), dout.contiguous()
    starts = batch.seq_starts if shared is None else shared.seq_starts
    call = _BackwardCall(
        *(x.data_ptr() for x in (q, k, v, dout, *into, starts)),
        *(q.stride(0), batch.context_lens.shape[0], q.shape[1], k.shape[1], q.shape[2], rule.window),
        *(rule.scale, rule.softcap, *_shared_addresses(shared)),
    )
    native.lib().ls_attention_backward(ctypes.addressof(call))


def _through_pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: ForwardBatch,
    dtype: torch.dtype,
    rule: Rule,
    sinks: Tensor | None,
    shared: SharedRows | None,
) -> Tensor:
    cache = LayerCache.allocate(batch.num_pages, k.shape[1], k.shape[2], dtype)
    return paged(q, k, v, batch, cache, rule, sinks, shared)


def packed(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    batch: ForwardBatch,
    dtype: torch.dtype,
    rule: Rule,
    sinks_H: Tensor | None,
    shared: SharedRows | None = None,
) -> Tensor:
    """Whole sequences through a pool made for the call, differentiable. With `shared`, q, k and v have its rows, the batch is
    `shared.whole`, and it must be `is_short` where gradients are recorded."""
    inputs = (q_THD, k_TGD, v_TGD, sinks_H)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        out: Tensor = _Packed.apply(*inputs, batch, dtype, rule, shared)  # type: ignore[no-untyped-call]
        return out
    return _through_pool(q_THD, k_TGD, v_TGD, batch, dtype, rule, sinks_H, shared)


def _sequence_backward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, dout: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsinks) of one sequence, a chunk of queries at a time."""
    num, num_heads, dim = q.shape
    groups = k.shape[1]
    keys, values = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()  # [G, N, D]
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    dsinks = None if sinks is None else torch.zeros(num_heads)
    dqs = []
    for start in range(0, num, _BACKWARD_QUERIES):
        end = min(start + _BACKWARD_QUERIES, num)
        first = max(0, start - rule.window + 1) if rule.window else 0
        seen = slice(first, end)
        heads = (groups, num_heads // groups, end - start, dim)
        query, grad = (x[start:end].permute(1, 0, 2).reshape(heads) for x in (q, dout))  # [G, U, C, D]
        key, value = keys[:, None, seen], values[:, None, seen]
        raw, slope = _scores(query, key, start, first, rule)
        weight, sink_weight = _weights(raw, sinks, groups)
        dvalues[:, seen] += (weight.transpose(-1, -2) @ grad).sum(1)
        dweight = grad @ value.transpose(-1, -2)
        along = (dweight * weight).sum(-1, keepdim=True)
        dscore = weight * (dweight - along)
        if dsinks is not None and sink_weight is not None:
            dsinks -= (sink_weight * along).sum((2, 3)).reshape(-1)
        dscore = dscore * rule.scale if slope is None else dscore * slope * rule.scale
        dqs.append((dscore @ key).reshape(num_heads, end - start, dim).transpose(0, 1))
        dkeys[:, seen] += (dscore.transpose(-1, -2) @ query).sum(1)
    return torch.cat(dqs), dkeys.transpose(0, 1), dvalues.transpose(0, 1), dsinks


def _scores(query: Tensor, key: Tensor, start: int, first: int, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """(scores [G, U, C, N] with -inf where nothing is seen, slope of the soft cap)."""
    raw = (query @ key.transpose(-1, -2)) * rule.scale
    slope = None
    if rule.softcap:
        squashed = torch.tanh(raw / rule.softcap)
        raw, slope = rule.softcap * squashed, 1.0 - squashed * squashed
    distance = torch.arange(start, start + raw.shape[2]).unsqueeze(1) - torch.arange(first, first + raw.shape[3])
    hidden = distance < 0
    if rule.window:
        hidden = hidden | (distance >= rule.window)
    return raw.masked_fill(hidden, -torch.inf), slope


def _weights(raw: Tensor, sinks: Tensor | None, groups: int) -> tuple[Tensor, Tensor | None]:
    if sinks is None:
        return raw.softmax(-1), None
    column = sinks.view(groups, -1, 1, 1).expand(*raw.shape[:3], 1)
    whole = torch.cat([raw, column], -1).softmax(-1)
    return whole[..., :-1], whole[..., -1:]
