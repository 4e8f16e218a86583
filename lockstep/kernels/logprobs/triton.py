"""Log-probabilities on a GPU: a row is one program, which joins blocks of 1,024 columns in float64, from the first on.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.gpu import differentiable
from lockstep.kernels.logprobs import naive


@triton.jit
def _gather(logits, tokens, out, tops, temperature, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, at = row * width, tl.arange(0, BLOCK)
    top = -float("inf")
    for column in range(0, width, BLOCK):
        value = tl.load(logits + start + column + at, mask=column + at < width, other=-float("inf")) / temperature
        top = tl.maximum(top, tl.max(value, 0))
    total = tl.zeros([1], dtype=tl.float64)
    for column in range(0, width, BLOCK):
        value = tl.load(logits + start + column + at, mask=column + at < width, other=-float("inf")) / temperature
        total += tl.sum(tl.exp(value - top), 0).to(tl.float64)
    chosen = tl.load(logits + start + tl.load(tokens + row)) / temperature
    found = (chosen - top).to(tl.float64) - tl.log(total)
    tl.store(out + row + tl.arange(0, 1), found.to(tl.float32))
    tl.store(tops + row, top)


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor, temperature: float) -> Tensor:
    """See `lockstep.kernels.token_logprobs`."""
    naive.check_ids(logits_RV, tokens_R)

    def run(logits: Tensor) -> Tensor:
        logits, tokens = logits.contiguous(), tokens_R.contiguous()
        out, tops = logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0])
        if out.numel():
            _gather[(out.numel(),)](logits, tokens, out, tops, temperature, logits.shape[1], BLOCK=naive.BLOCK)
            # The largest of a row with a NaN is either, so the log-probability is looked at too.
            bad = ~torch.isfinite(tops) | torch.isnan(out)
            if bool(bad.any()):
                raise naive.no_distribution(logits, int(bad.to(torch.int64).argmax()))
        return out

    reference = partial(naive.token_logprobs, tokens_R=tokens_R, temperature=temperature)
    out: Tensor = differentiable(run, reference, (logits_RV,))
    return out


def top_logprobs(logits_RV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """By torch's stable sort, which is the reference's."""
    return naive.top_logprobs(logits_RV, num)
