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


def wrong_temperature(temperature_R: Tensor, row: int) -> InputError:
    """For a temperature that no distribution has."""
    return InputError(
        f"temperature[{row}] is {float(temperature_R[row])}; expected a finite number from 0", field="temperature"
    )


def sample_tokens(logits_RV: Tensor, columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Every row on its own; `columns` are the fields of `Rule` in order."""
    valid = [0.0 <= value < float("inf") for value in columns[0].tolist()]
    if not all(valid):
        raise wrong_temperature(columns[0], valid.index(False))
    finite = torch.isfinite(logits_RV.amax(1)).tolist() if len(logits_RV) else []
    if not all(finite):
        raise logprobs.no_distribution(logits_RV, finite.index(False))
    rules = [Rule(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]
    drawn = [sample_row(row, rule) for row, rule in zip(logits_RV.cpu(), rules, strict=True)]
    tokens = torch.tensor([token for token, _ in drawn], dtype=torch.int64)
    return tokens, torch.tensor([logprob for _, logprob in drawn], dtype=torch.float32)


def wrong_token(tokens_R: Tensor, row: int, vocab: int) -> InputError:
    """For a token outside the vocabulary."""
    return InputError(f"tokens[{row}] is {int(tokens_R[row])}; expected 0..{vocab - 1}", field="tokens")


def score_row(logits_V: Tensor, token: int, rule: Rule) -> tuple[float, Tensor]:
    """(log-probability of the token among the kept ones, itself included; which are kept, bool [V])."""
    scaled = logits_V / rule.temperature
    top, log_total = logprobs.log_sum_exp(scaled.unsqueeze(0))
    kept_V = torch.ones(len(scaled), dtype=torch.bool)
    if not rule.keeps_all:
        kept_V[:] = False
        kept_V[torch.from_numpy(kept_tokens(scaled.numpy(), rule))] = True
        kept_V[token] = True
        log_total = (scaled[kept_V] - top).exp().double().sum().log().unsqueeze(0)
    return float(((scaled[token] - top).double() - log_total).float()), kept_V


def score_tokens(logits_RV: Tensor, tokens_R: Tensor, columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Every row on its own; `columns` are temperature, top_k, top_p, min_p and typical_p."""
    valid = [0.0 < value < float("inf") for value in columns[0].tolist()]
    if not all(valid):
        raise wrong_temperature(columns[0], valid.index(False))
    known = [0 <= token < logits_RV.shape[1] for token in tokens_R.tolist()]
    if not all(known):
        raise wrong_token(tokens_R, known.index(False), logits_RV.shape[1])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    rules = [Rule(heat, top_k, top_p, min_p, typical_p, 0, 0) for heat, top_k, top_p, min_p, typical_p in rows]
    scored = [
        score_row(row, token, rule) for row, token, rule in zip(logits_RV.cpu(), tokens_R.tolist(), rules, strict=True)
    ]
    kept = torch.stack([kept_V for _, kept_V in scored]) if scored else torch.ones(logits_RV.shape, dtype=torch.bool)
    return torch.tensor([logprob for logprob, _ in scored], dtype=torch.float32), kept
