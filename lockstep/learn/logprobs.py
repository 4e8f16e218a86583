"""What a model says about the tokens of a micro-batch: the learner's side of `trainer logprob == sampler logprob`.

Legend: T packed tokens, R weighted rows, r rows of a chunk, E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lockstep.core.adapters import RowAdapter
from lockstep.core.errors import ConfigError
from lockstep.core.sampling import SamplingParams
from lockstep.kernels.logprobs import entropy as entropy_of
from lockstep.kernels.logprobs import head_logprobs, head_logprobs_and_entropy, token_logprobs
from lockstep.kernels.sampling import score_tokens
from lockstep.learn.packing import MicroBatch
from lockstep.models.language import LanguageModel

ROWS = 64
"""Rows whose logits are held at a time where the head is not one plain matrix, or sampling is truncated."""


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Which tokens the sampler drew from; see `SamplingParams`.

    >>> Truncation.of(SamplingParams(top_p=0.9))
    Truncation(top_k=0, top_p=0.9, min_p=0.0, typical_p=1.0)
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0

    @staticmethod
    def of(params: SamplingParams) -> Truncation | None:
        """What a learner needs of the sampler's parameters; None where all tokens may be drawn.

        Raises:
            ConfigError: penalties, bans, a bias or a grammar, which depend on the text: the learner cannot compute the
                distribution that was drawn from. Correct by the recorded `sampling_logprobs` instead.
        """
        plain = replace(params, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0)
        free = SamplingParams(
            max_tokens=params.max_tokens,
            stop=params.stop,
            include_stop=params.include_stop,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
            seed=params.seed,
            n=params.n,
            num_logprobs=params.num_logprobs,
            prompt_logprobs=params.prompt_logprobs,
        )
        if plain != free:
            raise ConfigError(
                "the sampler shapes logits by penalties, bans, a bias, min_tokens or a grammar; a learner knows temperature, "
                "top_k, top_p, min_p and typical_p"
            )
        found = Truncation(top_k=params.top_k, top_p=params.top_p, min_p=params.min_p, typical_p=params.typical_p)
        return None if found == Truncation() else found


@dataclass(frozen=True, kw_only=True, eq=False)
class Logprobs:
    """Of the rows of one micro-batch."""

    logprob_R: Tensor
    """log softmax(logits / temperature) at each target, among the kept tokens where sampling was truncated: the bits of the
    engine's `sampling_logprobs`; at temperature 1 and without truncation those of its `logprobs` too."""
    hidden_RE: Tensor
    """Hidden states that the logits are made of; a value head reads them."""
    entropy_R: Tensor | None = None
    """Entropy of softmax(logits / temperature) in nats; None unless asked for."""


def micro_logprobs(
    model: LanguageModel,
    micro: MicroBatch,
    *,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
    adapter: RowAdapter | None = None,
    entropy: bool = False,
) -> Logprobs:
    """One forward pass, differentiable where gradients are recorded. [R, V] is never held whole.

    Args:
        temperature: of the policy that is learned; pass the sampler's, and the numbers are those it drew from.
        truncation: the sampler's. A token that these weights would not keep counts as kept, so its number is finite.
        adapter: that every row goes through; None: the model alone, which is the reference of an adapter.
        entropy: compute entropies from the same logits.

    Raises:
        ConfigError: a temperature that is not above 0.
        InputError: tokens outside the vocabulary, or logits that are not finite.
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(
            f"temperature={temperature}; expected a finite number above 0: a greedy policy has no gradient"
        )
    batch = micro.batch if adapter is None else micro.batch.with_adapter(adapter)
    hidden_RE = model(batch, None).index_select(0, micro.rows_R)
    targets_R, weight = micro.targets_R, plain_head(model)
    entropy_R = None
    if weight is None or truncation is not None:
        logprob_R, entropy_R = _in_chunks(model, hidden_RE, targets_R, temperature, truncation, entropy)
    elif entropy:
        logprob_R, entropy_R = head_logprobs_and_entropy(
            hidden_RE, weight, targets_R, model.head, temperature=temperature, softcap=model.final_softcap
        )
    else:
        logprob_R = head_logprobs(
            hidden_RE, weight, targets_R, model.head, temperature=temperature, softcap=model.final_softcap
        )
    return Logprobs(logprob_R=logprob_R, hidden_RE=hidden_RE, entropy_R=entropy_R)


@torch.no_grad()
def forward_logprobs(
    model: LanguageModel,
    micros: Sequence[MicroBatch],
    *,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
    adapter: RowAdapter | None = None,
) -> list[Tensor]:
    """logprob_R of each micro-batch, without gradients: of a reference model, or of the policy before an update."""
    return [
        micro_logprobs(model, micro, temperature=temperature, truncation=truncation, adapter=adapter).logprob_R
        for micro in micros
    ]


def plain_head(model: LanguageModel) -> nn.Parameter | None:
    """The head's weight, if the head computes with nothing else (no bias, no adapter, no packed-only matrix)."""
    weight = model.head.weight
    parameters = list(model.head.parameters())
    return weight if len(parameters) == 1 and parameters[0] is weight else None


def _in_chunks(
    model: LanguageModel,
    hidden_RE: Tensor,
    targets_R: Tensor,
    temperature: float,
    truncation: Truncation | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Through `model.logits` a few rows at a time, whose logits are made again in the backward pass."""

    def some(hidden_rE: Tensor, targets_r: Tensor) -> tuple[Tensor, Tensor]:
        logits_rV = model.logits(hidden_rE)
        if truncation is None:
            chosen_r = token_logprobs(logits_rV, targets_r, temperature)
        else:
            chosen_r = _truncated(logits_rV, targets_r, temperature, truncation)
        return chosen_r, entropy_of(logits_rV, temperature) if entropy else chosen_r.detach()

    parts = [
        checkpoint(some, rows, ids, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else some(rows, ids)
        for rows, ids in zip(hidden_RE.split(ROWS), targets_R.split(ROWS), strict=True)
    ]
    logprob_R, entropy_R = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprob_R, entropy_R if entropy else None


def _truncated(logits_rV: Tensor, targets_r: Tensor, temperature: float, truncation: Truncation) -> Tensor:
    """The sampler's number, with the gradient of the softmax over the kept tokens, which are held constant."""

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(targets_r.shape, value, dtype=dtype, device=targets_r.device)

    top_k = column(truncation.top_k, torch.int64)
    floats = (temperature, truncation.top_p, truncation.min_p, truncation.typical_p)
    heat, *shares = (column(value, torch.float32) for value in floats)
    value_r, kept_rV = score_tokens(logits_rV.detach(), targets_r, heat, top_k, *shares)
    if not logits_rV.requires_grad:
        return value_r
    logprob_rV = (logits_rV / temperature).masked_fill(~kept_rV, -torch.inf).log_softmax(1)
    slope_r = logprob_rV.gather(1, targets_r.unsqueeze(1)).squeeze(1)
    return value_r + (slope_r - slope_r.detach())
