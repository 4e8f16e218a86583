"""Attention and rotary embeddings.

Legend: N rows, H query heads, G key and value heads, Q query steps, K key steps, D and V head sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.models.graph.call import Call
from lockstep.models.graph.ops.cast import DTYPES
from lockstep.models.graph.values import Value, to_tensors

Function = Callable[..., Any]


def heads(x: Tensor, num: int) -> Tensor:
    """[N, T, H * D] -> [N, H, T, D]; 4 axes stay."""
    return x if x.ndim == 4 else x.reshape(x.shape[0], x.shape[1], num, -1).transpose(1, 2)


def attention(
    call: Call,
    query: Value,
    key: Value,
    value: Value,
    mask: Value = None,
    past_key: Value = None,
    past_value: Value = None,
    lengths: Value = None,
) -> Any:
    """softmax(scale Q K^T + mask) V (Vaswani et al. 2017) with cached keys, grouped heads and a soft cap."""
    query, key, value, mask, past_key, past_value, lengths = to_tensors(
        (query, key, value, mask, past_key, past_value, lengths)
    )
    flat = query.ndim == 3
    q = heads(query, call.get("q_num_heads", 0))
    k, v = heads(key, call.get("kv_num_heads", 0)), heads(value, call.get("kv_num_heads", 0))
    past = 0
    if past_key is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], dim=2), torch.cat([past_value, v], dim=2)
    present = k, v
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scale = math.sqrt(call.get("scale", 1 / math.sqrt(q.shape[-1])))
    raw = (q * scale) @ (k * scale).transpose(2, 3)
    cap = call.get("softcap", 0.0)
    # The cap comes before the mask: it would make -inf finite.
    capped = cap * torch.tanh(raw / cap) if cap else raw
    bias = _bias(call, q, k, mask, lengths, past)
    biased = capped if bias is None else capped + bias
    precision = call.get("softmax_precision", 0)
    wide = biased.to(DTYPES[precision]) if precision else biased
    weights = torch.softmax(wide, dim=-1)
    if bias is not None:
        # A row that sees nothing attends to nothing.
        blind = torch.isneginf(bias).all(-1, keepdim=True)
        weights = torch.where(blind, torch.zeros_like(weights), weights)
    weights = weights.to(q.dtype)
    out = weights @ v
    if flat:
        out = out.transpose(1, 2).flatten(2)
    return out, *present, (raw, capped, biased, weights)[call.get("qk_matmul_output_mode", 0)]


def _bias(call: Call, q: Tensor, k: Tensor, mask: Tensor | None, lengths: Tensor | None, past: int) -> Tensor | None:
    """What is added to the scores: -inf where a key is not seen."""
    bias = None
    steps, keys = q.shape[2], k.shape[2]
    if mask is not None:
        bias = mask
        if mask.dtype == torch.bool:
            zero = torch.zeros((), dtype=q.dtype, device=q.device)
            bias = torch.where(mask, zero, torch.full_like(zero, -torch.inf))
        if bias.shape[-1] < keys:
            bias = F.pad(bias, (0, keys - bias.shape[-1]), value=-torch.inf)
    if lengths is not None:
        unseen = torch.arange(keys, device=q.device) >= lengths.view(-1, 1, 1, 1)
        pad = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device).masked_fill(unseen, -torch.inf)
        bias = pad if bias is None else bias + pad
    left, right = call.get("left_window_size", -1), call.get("right_window_size", -1)
    if call.get("is_causal", 0):
        right = 0 if right < 0 else min(right, 0)
    if left >= 0 or right >= 0:
        # Queries are the last steps before the end of the keys that count.
        at = torch.arange(steps, device=q.device).unsqueeze(1) + past
        if lengths is not None and not past:
            at = at + (lengths.view(-1, 1, 1, 1) - steps)
        ahead = torch.arange(keys, device=q.device) - at
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        hidden = hidden | (ahead > right) if right >= 0 else hidden
        hidden = hidden | (-ahead > left) if left >= 0 else hidden
        band = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, -torch.inf)
        bias = band if bias is None else bias + band
    return bias


def rotary(call: Call, x: Value, cos: Value, sin: Value, positions: Value = None) -> Tensor:
    """Rotation of pairs of features by the position's angle (Su et al. 2021)."""
    x, cos, sin, positions = to_tensors((x, cos, sin, positions))
    flat = x.ndim == 3
    y = heads(x, call.get("num_heads", 0)) if flat else x
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = call.get("rotary_embedding_dim", 0) or y.shape[-1]
    turned, rest = y[..., :size], y[..., size:]
    if call.get("interleaved", 0):
        first, second = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        out = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    out = torch.cat([out, rest], dim=-1)
    return out.transpose(1, 2).reshape(x.shape) if flat else out


def linear_attention(
    call: Call, query: Value, key: Value, value: Value, past: Value = None, decay: Value = None, beta: Value = None
) -> tuple[Tensor, Tensor]:
    """Recurrent form of linear attention, state S [N, G, D, V]: S decays by exp(g), is corrected by the delta rule (Yang et
    al. 2024), gains k v^T; the output is q S."""
    query, key, value, past, decay, beta = to_tensors((query, key, value, past, decay, beta))
    num_q, num_kv = call.need("q_num_heads"), call.need("kv_num_heads")
    q, k, v = (heads(x, n).to(torch.float32) for x, n in ((query, num_q), (key, num_kv), (value, num_kv)))
    scale = call.get("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    rows, steps = query.shape[:2]
    factor = None
    if decay is not None:
        factor = decay.to(torch.float32).reshape(rows, steps, num_kv, -1).transpose(1, 2).exp()
    rate = None if beta is None else beta.to(torch.float32).transpose(1, 2).unsqueeze(-1)
    if past is None:
        state = q.new_zeros(rows, num_kv, k.shape[-1], v.shape[-1])
    else:
        state = past.to(torch.float32)
    outs = []
    for t in range(steps):
        k_t, v_t = k[:, :, t], v[:, :, t]
        if factor is not None:
            state = state * factor[:, :, t].unsqueeze(-1)
        if rate is not None:
            v_t = rate[:, :, t] * (v_t - (state * k_t.unsqueeze(-1)).sum(2))
        state = state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        seen = state.repeat_interleave(num_q // num_kv, dim=1)
        outs.append((seen * q[:, :, t].unsqueeze(-1)).sum(2) * scale)
    out = torch.stack(outs, dim=2).transpose(1, 2).flatten(2)
    return out.to(query.dtype), state.to(query.dtype if past is None else past.dtype)


def causal_conv(call: Call, x: Value, weight: Value, bias: Value = None, past: Value = None) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over the past, whose last k - 1 steps are the state."""
    x, weight, bias, past = to_tensors((x, weight, bias, past))
    reach = weight.shape[2] - 1
    padded = F.pad(x, (reach, 0)) if past is None else torch.cat([past, x], dim=2)
    out = F.conv1d(padded, weight, bias, groups=x.shape[1])
    if call.get("activation", "none") in ("silu", "swish"):
        wide = out.to(torch.float32)
        out = (wide * torch.sigmoid(wide)).to(out.dtype)
    return out, padded[:, :, padded.shape[2] - reach :]


def swiglu(call: Call, gate: Value, x: Value) -> Tensor:
    gate, x = to_tensors((gate, x))
    return gate * torch.sigmoid(call.get("alpha", 1.0) * gate) * x


OPS: dict[str, Function] = {
    "Attention": attention,
    "CausalConvWithState": causal_conv,
    "LinearAttention": linear_attention,
    "RotaryEmbedding": rotary,
    "SwiGLU": swiglu,
}
