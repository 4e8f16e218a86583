"""Reference categorical head in plain torch.

Legend: M rows, A logits of all blocks together, C choices of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(logits_MC: Tensor) -> Tensor:
    """Sums over choices in rising order, so that a row's bits do not depend on the row count."""
    shifted = logits_MC - logits_MC.detach().amax(1, keepdim=True).clamp(min=-3e38)
    powers = shifted.exp()
    total = powers[:, 0]
    for c in range(1, powers.shape[1]):
        total = total + powers[:, c]
    return shifted - total.log().unsqueeze(1)


def _entropy(logprob_MC: Tensor) -> Tensor:
    live = logprob_MC > -87.3
    safe = torch.where(live, logprob_MC, torch.zeros_like(logprob_MC))
    terms = torch.where(live, safe.exp() * safe, torch.zeros_like(safe))
    total = terms[:, 0]
    for c in range(1, terms.shape[1]):
        total = total + terms[:, c]
    return -total


def evaluate(logits_MA: Tensor, actions: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(logprob_M, entropy_M), summed over blocks."""
    actions_MB = actions.view(logits_MA.shape[0], len(sizes))
    logprob = entropy = None
    for b, block in enumerate(logits_MA.split(list(sizes), dim=1)):  # type: ignore[no-untyped-call]
        table = log_softmax(block)
        chosen, ent = table.gather(1, actions_MB[:, b : b + 1]).squeeze(1), _entropy(table)
        logprob = chosen if logprob is None else logprob + chosen
        entropy = ent if entropy is None else entropy + ent
    assert logprob is not None
    assert entropy is not None
    return logprob, entropy


def sample(logits_MA: Tensor, uniform_MA: Tensor | None, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(actions [M, blocks], logprob_M) by Gumbel-max; no uniforms: the mode."""
    scores = logits_MA if uniform_MA is None else logits_MA - torch.log(-torch.log(uniform_MA))
    columns = []
    for block in scores.split(list(sizes), dim=1):  # type: ignore[no-untyped-call]
        # torch.argmax does not promise the first of equal maxima.
        is_max = block == block.amax(1, keepdim=True)
        columns.append((is_max.to(torch.int64).cumsum(1) == 0).sum(1).clamp(max=block.shape[1] - 1))
    actions = torch.stack(columns, 1)
    return actions, evaluate(logits_MA, actions, sizes)[0]
