"""Embeddings: one vector for a text, out of a language model's hidden states.

Legend: N texts, T packed tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import InputError
from lockstep.engine.runner import ServedModel

_BATCH_TOKENS = 2048


class Pooling(Enum):
    """Which hidden states make the vector."""

    MEAN = "mean"
    LAST = "last"
    """The last token's: the one that has seen the whole text."""
    CLS = "cls"
    """The first token's."""


@torch.no_grad()
def embed(
    model: ServedModel, prompts: Sequence[Sequence[int]], pooling: Pooling = Pooling.LAST, *, normalise: bool = True
) -> Tensor:
    """Vectors [N, E] float32; a text's vector does not depend on the other texts.

    Args:
        prompts: token ids.
        normalise: to length 1.

    Raises:
        InputError: a text that is empty or longer than the model's context, or an unknown token.
    """
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= model.max_context:
            raise InputError(
                f"text {index} has {len(prompt)} tokens; expected 1 to {model.max_context}", field=f"input[{index}]"
            )
        if not (min(prompt) >= 0 and max(prompt) < model.vocab_size):
            raise InputError(f"text {index} has a token outside 0..{model.vocab_size - 1}", field=f"input[{index}]")
    vectors: list[Tensor] = []
    for group in _groups(prompts):
        batch = ForwardBatch.packed([torch.tensor(prompt) for prompt in group])
        hidden_TE, starts = model(batch, None), batch.seq_starts.tolist()
        for first, end in pairwise(starts):
            states = hidden_TE[first:end]
            vectors.append({Pooling.LAST: states[-1], Pooling.CLS: states[0]}.get(pooling, states.mean(0)))
    if not vectors:
        raise InputError("no texts to embed; give at least one", field="input")
    found = torch.stack(vectors)
    return found / found.norm(dim=1, keepdim=True).clamp_min(1e-12) if normalise else found


def _groups(prompts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Neighbours that together have a bounded number of tokens."""
    groups: list[list[Sequence[int]]] = []
    room = 0
    for prompt in prompts:
        if not groups or len(prompt) > room:
            groups.append([])
            room = _BATCH_TOKENS
        groups[-1].append(prompt)
        room -= len(prompt)
    return groups
