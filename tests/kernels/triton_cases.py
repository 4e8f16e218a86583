"""Run by test_triton.py."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.activation import KINDS, activate, gated
from lockstep.kernels.attention import LayerCache, attention
from lockstep.kernels.logprobs import token_logprobs
from lockstep.kernels.norm import add_rms_norm, layer_norm, rms_norm
from lockstep.kernels.packed_linear import grouped_linear, pack, pack_blocks, packed_linear
from lockstep.kernels.rope import rope
from tests.kernels.test_pack_blocks import random_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
randn = functools.partial(torch.randn, device=DEVICE)


@contextmanager
def on_gpu() -> Iterator[None]:
    """On the CPU the compiled kernels would be taken first."""
    before, native.state.fast = native.state.fast, False
    with kernels.force("triton"):
        yield
    native.state.fast = before


def agree(op: Callable[..., Any], *inputs: Tensor, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """Values, and gradients of all float inputs."""
    found = []
    for context in (on_gpu(), kernels.force("naive")):
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        with context:
            out = op(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            weights = [torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape) for y in out]
            sum((y * w).sum() for y, w in zip(out, weights, strict=True)).backward()  # type: ignore[union-attr]
        found.append([y.detach() for y in out] + [x.grad for x in leaves if x.grad is not None])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def same_rows(op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Any rows alone have the bits that they have among others."""
    with on_gpu(), torch.no_grad():
        whole = op(x)
        for first, last in ((3, 4), (2, len(x))):
            assert torch.equal(op(x[first:last]), whole[first:last]), (first, last)


def norms() -> None:
    for width in (1, 63):
        x, weight, bias = randn(6, width), randn(width), randn(width)
        agree(lambda x, w: rms_norm(x, w, 1e-5, 1.0), x, weight)
        agree(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), x, randn(6, width), weight)
        agree(lambda x, w, b: layer_norm(x, w, b, 1e-2), x, weight, bias)
        same_rows(functools.partial(rms_norm, weight_E=weight, eps=1e-5), x)
        same_rows(functools.partial(layer_norm, weight_E=None, bias_E=bias, eps=1e-5), x)


def activations() -> None:
    x = torch.cat([randn(5, 62) * 3, torch.tensor([[-90.0, 90.0] * 31], device=DEVICE)])
    for kind in KINDS:
        agree(lambda x, kind=kind: activate(x, kind), x)
        agree(lambda x, kind=kind: gated(x, kind), x)
        same_rows(functools.partial(gated, kind=kind), x)


def rotations() -> None:
    cos, sin, positions = randn(9, 5), randn(9, 5), torch.tensor([8, 0, 3, 3], device=DEVICE)
    for interleaved in (False, True):
        agree(lambda x, interleaved=interleaved: rope(x, positions, cos, sin, interleaved), randn(4, 3, 17))
    with on_gpu(), pytest.raises(InputError, match="the tables hold"):
        rope(randn(1, 1, 10), torch.tensor([9], device=DEVICE), cos, sin)


def logprobs() -> None:
    logits, tokens = randn(5, 1500) * 4, torch.tensor([0, 1499, 3, 700, 1024], device=DEVICE)
    for temperature in (1.0, 0.7):
        agree(lambda x, t=temperature: token_logprobs(x, tokens, t), logits)
    with on_gpu():
        some = token_logprobs(logits[2:3], tokens[2:3])
        assert torch.equal(some, token_logprobs(logits, tokens)[2:3])
        for bad in (-torch.inf, torch.inf, torch.nan):
            broken = logits.clone()
            broken[3, : None if bad == -torch.inf else 2] = bad
            with pytest.raises(InputError, match=r"logits\[3\]"):
                token_logprobs(broken, tokens)


def products() -> None:
    matrices = [pack(randn(70, 33), format) for format in ("fp32", "bf16")]
    matrices += [pack(randn(33, 64), "int8"), pack(randn(33, 128), "int8", 128), pack(randn(33, 64), "int4", 64)]
    if DEVICE == "cpu":
        matrices += [pack_blocks([random_blocks(kind, 20, 1)]) for kind in ("Q2_K", "Q4_1", "IQ4_NL")]
    for packed in matrices:
        x, bias = randn(18, packed.num_inputs), randn(packed.num_outputs)
        for given in (None, bias):
            with on_gpu():
                mine = packed_linear(x, packed, given)
            with kernels.force("naive"):
                theirs = packed_linear(x, packed, given)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
        if (
            packed.format != "bf16" or DEVICE == "cuda"
        ):  # the interpreter's `dot` is NumPy's, whose sums depend on the place
            same_rows(functools.partial(packed_linear, packed=packed), x)


def experts() -> None:
    packs, starts = [pack(randn(40, 64), "int8") for _ in range(4)], torch.tensor([0, 3, 3, 20, 21])
    x, bias = randn(21, 64), randn(4, 40)
    with on_gpu():
        mine = grouped_linear(x, packs, starts, bias)
        for index, (first, last) in enumerate(itertools.pairwise(starts)):
            assert torch.equal(mine[first:last], packed_linear(x[first:last], packs[index], bias[index]))


def attentions() -> None:
    heads, groups, dim = 2, 1, 5
    batch = ForwardBatch.packed([torch.zeros(length, dtype=torch.int64) for length in (14, 1)])
    q, k, v = randn(15, heads, dim), randn(15, groups, dim), randn(15, groups, dim)
    for window, softcap, sinks in ((0, 0.0, None), (5, 0.0, None), (0, 3.0, None), (9, 0.0, randn(heads))):
        rule = {"scale": 0.3, "window": window, "softcap": softcap}
        given = () if sinks is None else (sinks,)

        def op(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor, rule: dict = rule) -> Tensor:
            return attention(q, k, v, batch, None, sinks_H=sinks[0] if sinks else None, **rule)

        agree(op, q, k, v, *given, rtol=1e-4, atol=1e-5)
    batch = ForwardBatch.packed([torch.zeros(68, dtype=torch.int64)])
    q, k, v = randn(68, 1, dim), randn(68, groups, dim), randn(68, groups, dim)
    for dtype in (torch.float32, torch.bfloat16):
        with on_gpu(), torch.no_grad():
            whole = attention(q, k, v, batch, None, scale=0.3, window=9, kv_dtype=dtype)
            cache = LayerCache.allocate(6, groups, dim, dtype)
            rows = []
            for first, last in ((0, 33), (33, 34), (34, 68)):
                step = ForwardBatch(
                    tokens_T=torch.zeros(last - first, dtype=torch.int64),
                    positions_T=torch.arange(first, last),
                    seq_starts=torch.tensor([0, last - first], dtype=torch.int32),
                    context_lens=torch.tensor([last], dtype=torch.int32),
                    pages_SP=torch.tensor([[5, 0, 3, 1, 2]], dtype=torch.int32),
                    num_pages=6,
                )
                part = (x[first:last] for x in (q, k, v))
                rows.append(attention(*part, step, cache, scale=0.3, window=9))
            assert torch.equal(torch.cat(rows), whole), "chunks through pages differ from the whole"


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for case in (norms, activations, rotations, logprobs, products, experts, attentions):
        start = time.perf_counter()
        case()
        print(f"{case.__name__} {time.perf_counter() - start:.1f} s", flush=True)
    print("all 9 ops agree")
