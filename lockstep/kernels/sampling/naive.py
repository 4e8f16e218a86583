"""Reference sampling in NumPy, a row at a time, by sorting the whole vocabulary.

Legend: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels.logprobs import naive as logprobs
from lockstep.kernels.noise import naive as noise


@dataclass(frozen=True)
class Rule:
    """One row's wishes; see `lockstep.kernels.sample_tokens`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    seed: int
    position: int

    @property
    def keeps_all(self) -> bool:
        return self.top_k <= 0 and self.top_p >= 1.0 and self.min_p <= 0.0 and self.typical_p >= 1.0


def _prefix(mass: NDArray[np.float64], share: float) -> int:
    """Length of the smallest prefix whose mass reaches `share` of the whole."""
    reached = np.cumsum(mass) >= share * mass.sum()
    return int(reached.argmax()) + 1 if reached.any() else len(mass)


def kept_tokens(logits_V: NDArray[np.float32], rule: Rule) -> NDArray[np.int64]:
    """Ids that may be drawn, most probable first; equal ones by rising id. Logits are already divided by temperature."""
    ids = np.argsort(-logits_V, kind="stable")
    ids = ids[logits_V[ids] > -np.inf]
    if rule.top_k > 0:
        ids = ids[: rule.top_k]
    weight = torch.from_numpy(logits_V[ids] - logits_V[ids[0]]).exp().numpy()
    if rule.top_p < 1.0:
        ids = ids[: _prefix(weight.astype(np.float64), rule.top_p)]
        weight = weight[: len(ids)]
    if rule.min_p > 0.0:
        ids = ids[weight >= np.float32(rule.min_p)]
        weight = weight[: len(ids)]
    if rule.typical_p < 1.0:
        mass = weight.astype(np.float64)
        shifted = (logits_V[ids] - logits_V[ids[0]]).astype(np.float64)
        live = mass > 0.0
        mean = (mass[live] * shifted[live]).sum() / mass.sum()  # entropy = log of the mass - mean
        # |-logprob - entropy| = |shifted - mean|, in float32 so that equally typical tokens are equal.
        order = np.lexsort((ids, np.abs(shifted - mean).astype(np.float32)))
        ids = ids[order[: _prefix(mass[order], rule.typical_p)]]
    return ids


def sample_row(logits_V: Tensor, rule: Rule) -> tuple[int, float]:
    """(token, its log-probability among the kept tokens)."""
    if rule.temperature == 0.0:
        return int((logits_V == logits_V.max()).to(torch.int64).argmax()), 0.0
    scaled = logits_V / rule.temperature
    top, log_total = logprobs.log_sum_exp(scaled.unsqueeze(0))
    values = scaled.numpy()
    ids = np.sort(kept_tokens(values, rule)) if not rule.keeps_all else np.arange(len(values))
    if not rule.keeps_all:
        log_total = (scaled[torch.from_numpy(ids)] - top).exp().double().sum().log().unsqueeze(0)
    zero = np.zeros(1, np.int64)
    uniform = noise.uniform(rule.seed, zero, np.array([rule.position]), len(values))[0]
    gumbel = -np.log(-np.log(uniform[ids].astype(np.float64)))
    token = int(ids[np.argmax(values[ids] + gumbel)])
    return token, float(((scaled[token] - top).double() - log_total).float())


def sample_tokens(logits_RV: Tensor, rules: list[Rule]) -> tuple[Tensor, Tensor]:
    """Every row on its own."""
    top = logits_RV.amax(1)
    for row, finite in enumerate(torch.isfinite(top).tolist()):
        if not finite:
            raise InputError(
                f"the largest of logits[{row}] is {float(top[row])}; expected a finite number", field="logits"
            )
    drawn = [sample_row(row, rule) for row, rule in zip(logits_RV.float().cpu(), rules, strict=True)]
    tokens = torch.tensor([token for token, _ in drawn], dtype=torch.int64)
    return tokens, torch.tensor([logprob for _, logprob in drawn], dtype=torch.float32)
