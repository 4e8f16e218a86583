"""Reference attention in plain torch: a running softmax over blocks of keys at absolute positions.

Sums are folded, so that a query's bits depend on the query and the keys it sees alone.
Legend: T packed tokens, t tokens of one sequence, H query heads, G kv heads, U query heads per kv head, D head dim,
N keys of one sequence, C keys of a block.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lockstep.core.batch import PAGE, ForwardBatch
from lockstep.core.errors import InputError
from lockstep.kernels.attention.cache import LayerCache
from lockstep.kernels.attention.codes import NUM_SCALES, decode, encode
from lockstep.kernels.folding import fold_sum

BLOCK = 4 * PAGE
"""Keys that the running softmax takes at a time: positions 64 b .. 64 b + 63."""
LOWEST = -3e38
"""Where the running maximum starts: finite, so that a block without a visible key changes nothing."""
_QUERIES = 32


class Rule(NamedTuple):
    """How scores become weights."""

    scale: float
    window: int
    softcap: float


class _Round(torch.autograd.Function):
    """To the cache's dtype and back; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype in NUM_SCALES:
            return decode(*encode(x.float(), dtype), x.shape[-1]).to(x.dtype)
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as the cache would give it back."""
    if dtype is torch.float32:
        return x
    out: Tensor = _Round.apply(x, dtype)  # type: ignore[no-untyped-call]
    return out


def _attend(q_tHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, first: int, rule: Rule, sinks_H: Tensor | None) -> Tensor:
    """Queries at positions first, first + 1, ... of one sequence; N is a multiple of BLOCK."""
    num, num_heads, dim = q_tHD.shape
    groups = k_NGD.shape[1]
    q = q_tHD.reshape(num, groups, num_heads // groups, 1, dim)
    position = torch.arange(first, first + num, device=q.device).view(num, 1, 1, 1)
    top = q.new_full(q.shape[:3], LOWEST) if sinks_H is None else sinks_H.view(1, groups, -1).expand(num, -1, -1)
    total = q.new_full(q.shape[:3], 0.0 if sinks_H is None else 1.0)
    out = q.new_zeros(*q.shape[:3], dim)
    for start in range(0, first + num, BLOCK):
        k, v = (x[start : start + BLOCK].transpose(0, 1).unsqueeze(1) for x in (k_NGD, v_NGD))  # [G, 1, C, D]
        key = torch.arange(start, start + BLOCK, device=q.device)
        visible = key <= position
        if rule.window:
            visible = visible & (key > position - rule.window)
        score = fold_sum(q * k) * rule.scale  # [t, G, U, C]
        if rule.softcap:
            score = rule.softcap * torch.tanh(score / rule.softcap)
        score = score.masked_fill(~visible, -torch.inf)
        new_top = torch.maximum(top, score.detach().amax(-1))
        old, weight = (top - new_top).exp(), (score - new_top.unsqueeze(-1)).exp()
        total = total * old + fold_sum(weight)
        out = out * old.unsqueeze(-1) + fold_sum((weight.unsqueeze(-1) * v).transpose(-1, -2))
        top = new_top
    return (out / total.unsqueeze(-1)).reshape(num, num_heads, dim)


def _sequence(q_tHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, first: int, rule: Rule, sinks: Tensor | None) -> Tensor:
    missing = -k_NGD.shape[0] % BLOCK
    k, v = (functional.pad(x, (0, 0, 0, 0, 0, missing)) for x in (k_NGD, v_NGD))
    parts = q_tHD.split(_QUERIES)  # type: ignore[no-untyped-call]
    return torch.cat([_attend(q, k, v, first + i * _QUERIES, rule, sinks) for i, q in enumerate(parts)])


def write(k_TGD: Tensor, v_TGD: Tensor, batch: ForwardBatch, cache: LayerCache, window: int) -> None:
    """This step's keys and values into their pages."""
    starts, lengths = batch.seq_starts.tolist(), batch.context_lens.tolist()
    for s, length in enumerate(lengths):
        num = starts[s + 1] - starts[s]
        if num < 0 or length < num:
            raise InputError(
                f"sequence {s} has {num} rows and {length} keys; expected 0 <= rows <= keys", field="seq_starts"
            )
        if num == 0:
            continue
        first = max(0, length - num + 1 - window) // PAGE if window else 0
        pages = batch.pages_SP[s, first : (length - 1) // PAGE + 1]
        if len(pages) + first < (length + PAGE - 1) // PAGE or ((pages < 0) | (pages >= cache.num_pages)).any():
            raise InputError(
                f"sequence {s} of {length} keys has pages {batch.pages_SP[s].tolist()}; expected one of "
                f"0..{cache.num_pages - 1} for every {PAGE} keys",
                field="pages",
            )
        position = torch.arange(length - num, length)
        page, slot = batch.pages_SP[s].to(torch.int64)[position // PAGE], position % PAGE
        cache.put(page, slot, k_TGD[starts[s] : starts[s + 1]], v_TGD[starts[s] : starts[s + 1]])


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
    """Writes this step's keys and values, then every query against the keys of its sequence in the cache."""
    write(k_TGD, v_TGD, batch, cache, rule.window)
    starts, lengths = batch.seq_starts.tolist(), batch.context_lens.tolist()
    out = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    for s, length in enumerate(lengths):
        q = q_THD[starts[s] : starts[s + 1]]
        if len(q) == 0:
            continue
        # Pages before a window may have been given back; what stands there is masked.
        page = batch.pages_SP[s, : (length + PAGE - 1) // PAGE].to(torch.int64).clamp(0, cache.num_pages - 1)
        first = max(0, length - len(q) + 1 - rule.window) // PAGE * PAGE if rule.window else 0
        k, v = cache.read(page, length, q.dtype)
        k[:first], v[:first] = 0.0, 0.0
        out[starts[s] : starts[s + 1]] = _sequence(q, k, v, length - len(q), rule, sinks_H)
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
    """Whole sequences without a cache, differentiable."""
    k, v = rounded(k_TGD, dtype), rounded(v_TGD, dtype)
    spans = itertools.pairwise(batch.seq_starts.tolist())
    return torch.cat([_sequence(q_THD[a:b], k[a:b], v[a:b], 0, rule, sinks_H) for a, b in spans])
