"""Sampling through the compiled kernel.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lockstep.kernels import native
from lockstep.kernels.logprobs.naive import no_distribution
from lockstep.kernels.sampling.naive import wrong_temperature, wrong_token


class _Call(ctypes.Structure):
    """LsSampling of csrc/language.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("logits", "temperature", "top_k", "top_p", "min_p", "typical_p")],
        *[(name, ctypes.c_void_p) for name in ("seeds", "positions", "tokens", "logprobs")],
        *[(name, ctypes.c_int64) for name in ("num_rows", "vocab")],
    ]


def sample_tokens(logits_RV: Tensor, columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """`columns` are temperature, top_k, top_p, min_p, typical_p, seeds and positions."""
    logits = native.contiguous(logits_RV)
    held = [native.contiguous(column) for column in columns]
    num, vocab = logits.shape
    tokens, logprobs = torch.empty(num, dtype=torch.int64), torch.empty(num)
    call = _Call(
        logits.data_ptr(), *[column.data_ptr() for column in held], tokens.data_ptr(), logprobs.data_ptr(), num, vocab
    )
    bad = native.lib().ls_sample_tokens(ctypes.addressof(call))
    if bad >= 0:
        raise no_distribution(logits, bad)
    if bad <= -2:
        raise wrong_temperature(columns[0], -2 - bad)
    return tokens, logprobs


def score_tokens(logits_RV: Tensor, tokens_R: Tensor, columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """`columns` are temperature, top_k, top_p, min_p and typical_p."""
    logits, tokens = native.contiguous(logits_RV), native.contiguous(tokens_R)
    held = [native.contiguous(column) for column in columns]
    num, vocab = logits.shape
    unused = torch.zeros(num, dtype=torch.int64)
    logprobs, kept = torch.empty(num), torch.empty(num, vocab, dtype=torch.uint8)
    places = [tensor.data_ptr() for tensor in (logits, *held, unused, unused, tokens, logprobs)]
    call = _Call(*places, num, vocab)
    bad = native.lib().ls_score_tokens(ctypes.addressof(call), kept.data_ptr())
    if bad >= 0:
        raise no_distribution(logits, bad)
    if bad <= -2 - num:
        raise wrong_token(tokens, -2 - num - bad, vocab)
    if bad <= -2:
        raise wrong_temperature(columns[0], -2 - bad)
    return logprobs, kept.view(torch.bool)
