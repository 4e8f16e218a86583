"""What a model says about the tokens of a micro-batch: the learner's side of `trainer logprob == sampler logprob`.

Legend: T packed tokens, R weighted rows, E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lockstep.core.errors import ConfigError
from lockstep.kernels.logprobs import entropy as entropy_of
from lockstep.kernels.logprobs import head_logprobs, head_logprobs_and_entropy, token_logprobs
from lockstep.models.language import LanguageModel
from lockstep.train.packing import MicroBatch

ROWS = 64
"""Rows whose logits are held at a time where the head is not one plain matrix."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Logprobs:
    """Of the rows of one micro-batch."""

    logprob_R: Tensor
    """log softmax(logits / temperature) at each target; at temperature 1 the bits of the engine's `logprobs`."""
    hidden_RE: Tensor
    """Hidden states that the logits are made of; a value head reads them."""
    entropy_R: Tensor | None = None
    """Entropy of softmax(logits / temperature) in nats; None unless asked for."""


def micro_logprobs(
    model: LanguageModel, micro: MicroBatch, *, temperature: float = 1.0, entropy: bool = False
) -> Logprobs:
    """One forward pass, differentiable where gradients are recorded. [R, V] is never held whole.

    Args:
        temperature: of the policy that is learned; pass the sampler's, and the numbers are those it drew from.
        entropy: compute entropies from the same logits.

    Raises:
        ConfigError: a temperature that is not above 0.
        InputError: tokens outside the vocabulary, or logits that are not finite.
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(
            f"temperature={temperature}; expected a finite number above 0: a greedy policy has no gradient"
        )
    hidden_RE = model(micro.batch, None).index_select(0, micro.rows_R)
    weight = plain_head(model)
    if weight is None:
        logprob_R, entropy_R = _in_chunks(model, hidden_RE, micro.targets_R, temperature, entropy)
    elif entropy:
        logprob_R, entropy_R = head_logprobs_and_entropy(
            hidden_RE, weight, micro.targets_R, model.head, temperature=temperature, softcap=model.final_softcap
        )
    else:
        entropy_R = None
        logprob_R = head_logprobs(
            hidden_RE, weight, micro.targets_R, model.head, temperature=temperature, softcap=model.final_softcap
        )
    return Logprobs(logprob_R=logprob_R, hidden_RE=hidden_RE, entropy_R=entropy_R)


@torch.no_grad()
def forward_logprobs(model: LanguageModel, micros: Sequence[MicroBatch], *, temperature: float = 1.0) -> list[Tensor]:
    """logprob_R of each micro-batch, without gradients: of a reference model, or of the policy before an update."""
    return [micro_logprobs(model, micro, temperature=temperature).logprob_R for micro in micros]


def plain_head(model: LanguageModel) -> nn.Parameter | None:
    """The head's weight, if the head computes with nothing else (no bias, no adapter, no packed-only matrix)."""
    weight = model.head.weight
    parameters = list(model.head.parameters())
    return weight if len(parameters) == 1 and parameters[0] is weight else None


def _in_chunks(
    model: LanguageModel, hidden_RE: Tensor, targets_R: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Through `model.logits` a few rows at a time, whose logits are made again in the backward pass."""

    def some(hidden_rE: Tensor, targets_r: Tensor) -> tuple[Tensor, Tensor]:
        logits_rV = model.logits(hidden_rE)
        chosen_r = token_logprobs(logits_rV, targets_r, temperature)
        return chosen_r, entropy_of(logits_rV, temperature) if entropy else chosen_r.detach()

    parts = [
        checkpoint(some, rows, ids, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else some(rows, ids)
        for rows, ids in zip(hidden_RE.split(ROWS), targets_R.split(ROWS), strict=True)
    ]
    logprob_R, entropy_R = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprob_R, entropy_R if entropy else None
