"""Attention on a GPU: a head of a query is one program, which walks the pages of its sequence in blocks of 64 keys at
absolute positions with a running softmax. Caches of codes take the reference.

Legend: T packed tokens, S sequences, H query heads, G kv heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.core.batch import PAGE, ForwardBatch
from lockstep.kernels.attention import naive
from lockstep.kernels.attention.cache import LayerCache
from lockstep.kernels.attention.naive import BLOCK, Rule
from lockstep.kernels.gpu import differentiable


@triton.jit
def _attend(
    q,
    k_pages,
    v_pages,
    sinks,
    owners,
    positions,
    pages,
    out,
    pages_stride,
    num_pages,
    heads,
    kv_heads,
    dim,
    window,
    scale,
    softcap,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGE_KEYS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token, head = row // heads, row % heads
    group = head // (heads // kv_heads)
    position = tl.load(positions + token)
    table = pages + tl.load(owners + token) * pages_stride
    at, key = tl.arange(0, DIM), tl.arange(0, KEYS)
    inside = at < dim
    query = tl.load(q + row * dim + at, mask=inside, other=0.0)
    if HAS_SINKS:
        top = tl.load(sinks + head)
        total = 1.0
    else:
        top = -3e38
        total = 0.0
    mixed = tl.zeros([DIM], dtype=tl.float32)
    first = 0
    if window > 0:
        first = tl.maximum(position - window + 1, 0) // KEYS * KEYS
    for start in range(first, position + 1, KEYS):
        place = start + key
        visible = place <= position
        if window > 0:
            visible = visible & (place > position - window)
        page = tl.load(table + place // PAGE_KEYS, mask=visible, other=0).to(tl.int64)
        visible = visible & (page >= 0) & (page < num_pages)
        cell, slot = (page * kv_heads + group) * dim * PAGE_KEYS, place % PAGE_KEYS
        wanted = visible[:, None] & inside[None, :]
        keys = tl.load(k_pages + cell[:, None] + at[None, :] * PAGE_KEYS + slot[:, None], mask=wanted, other=0.0)
        values = tl.load(v_pages + cell[:, None] + slot[:, None] * dim + at[None, :], mask=wanted, other=0.0)
        score = tl.sum(query[None, :] * keys.to(tl.float32), 1) * scale
        if HAS_SOFTCAP:
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
        score = tl.where(visible, score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        old, weight = tl.exp(top - new_top), tl.exp(score - new_top)
        total = total * old + tl.sum(weight, 0)
        mixed = mixed * old + tl.sum(weight[:, None] * values.to(tl.float32), 0)
        top = new_top
    tl.store(out + row * dim + at, mixed / total, mask=inside)


@torch.no_grad()
def paged(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    batch: ForwardBatch,
    cache: LayerCache,
    rule: Rule,
    sinks_H: Tensor | None,
) -> Tensor:
    """Writes this step's keys and values, then attends."""
    if cache.k_scale is not None:
        return naive.paged(q_THD, k_TGD, v_TGD, batch, cache, rule, sinks_H)
    naive.write(k_TGD, v_TGD, batch, cache, rule.window)
    q, (tokens, heads, dim) = q_THD.contiguous(), q_THD.shape
    out = torch.empty_like(q)
    if not out.numel():
        return out
    starts, lengths = batch.seq_starts.to(torch.int64), batch.context_lens.to(torch.int64)
    nums = starts[1:] - starts[:-1]
    owners = torch.repeat_interleave(torch.arange(len(nums), device=nums.device), nums)
    positions = torch.arange(tokens, device=nums.device) - starts[:-1][owners] + (lengths - nums)[owners]
    pages = batch.pages_SP.contiguous()
    owners, positions, pages = (x.to(q.device) for x in (owners, positions, pages))
    _attend[(tokens * heads,)](
        *(q, cache.k, cache.v, q if sinks_H is None else sinks_H.contiguous(), owners, positions, pages, out),
        *(pages.shape[1], cache.num_pages, heads, cache.kv_heads, dim, rule.window, rule.scale, rule.softcap),
        HAS_SINKS=sinks_H is not None,
        HAS_SOFTCAP=rule.softcap != 0.0,
        PAGE_KEYS=PAGE,
        KEYS=BLOCK,
        DIM=triton.next_power_of_2(dim),
    )
    return out


def packed(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    batch: ForwardBatch,
    dtype: torch.dtype,
    rule: Rule,
    sinks_H: Tensor | None,
) -> Tensor:
    """Whole sequences through a pool made for the call, differentiable."""

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        cache = LayerCache.allocate(batch.num_pages, k.shape[1], k.shape[2], dtype, q.device)
        return paged(q, k, v, batch, cache, rule, sinks)

    def reference(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        return naive.packed(q, k, v, batch, dtype, rule, sinks)

    out: Tensor = differentiable(run, reference, (q_THD, k_TGD, v_TGD, sinks_H))
    return out
