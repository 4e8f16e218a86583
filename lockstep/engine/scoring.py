"""Log-probabilities of prompt tokens.

Legend: R rows, E model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.engine.runner import Gathered, ServedModel
from lockstep.engine.sampler import alternatives
from lockstep.kernels.logprobs import token_logprobs

_ROWS = 64
"""Rows whose logits are held at a time."""


@torch.no_grad()
def score_prompts(model: ServedModel, hidden_RE: Tensor, gathered: Gathered) -> None:
    """Appends to the samples what this step found out about their prompts."""
    for scored in gathered.scored:
        sequence = scored.sequence
        sample, num_wanted = sequence.sample, sequence.request.params.prompt_logprobs or 0
        for start in range(0, scored.num, _ROWS):
            num = min(_ROWS, scored.num - start)
            row, after = scored.first_row + start, scored.position + start + 1
            logits_RV = model.logits(hidden_RE[row : row + num])
            targets = torch.tensor(sequence.tokens[after : after + num])
            sample.prompt_logprobs += token_logprobs(logits_RV, targets).tolist()
            sample.prompt_alternatives += alternatives(logits_RV, [num_wanted] * num)
        sequence.num_scored = scored.position + scored.num
