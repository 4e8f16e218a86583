"""Losses of supervised and preference training: tensors in, (loss, metrics) out.

Sign: every loss is minimised. Who divides: a loss is a sum over the pairs (or samples) given, divided by `num`, their number
in the whole batch, so that the shares of micro-batches add up.

Legend: R tokens (rows), P pairs of a chosen and a rejected answer, N answers, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.learn.learner import Loss, Metrics
from lockstep.learn.logprobs import Logprobs
from lockstep.learn.packing import MicroBatch

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def likelihood_loss(num_tokens: float) -> Loss:
    """Negative log-likelihood of the weighted tokens: −Σ w log π / num_tokens, with num_tokens = Σ w of the whole batch."""

    def loss(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        share = -(logprobs.logprob_R * micro.weight_R).sum() / num_tokens
        return share, {"nll": share.detach()}

    return loss


def dpo_loss(margin_P: Tensor, *, num: int, beta: float = 0.1, label_smoothing: float = 0.0) -> tuple[Tensor, Metrics]:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): −log σ(β h).

    Args:
        margin_P: h = (log π(chosen) − log ref(chosen)) − (log π(rejected) − log ref(rejected)), sums over tokens.
        label_smoothing: chance ε that a label is wrong: −(1 − ε) log σ(β h) − ε log σ(−β h) (Mitchell 2023).
    """
    logit_P = beta * margin_P
    loss_P = -(1.0 - label_smoothing) * logsigmoid(logit_P) - label_smoothing * logsigmoid(-logit_P)
    return loss_P.sum() / num, _margins(logit_P, num)


def ipo_loss(margin_P: Tensor, *, num: int, tau: float = 0.1) -> tuple[Tensor, Metrics]:
    """Identity preference optimisation (Azar et al. 2024, eq. 17): (h − 1 / (2 τ))², with h of `dpo_loss`."""
    return ((margin_P - 0.5 / tau) ** 2).sum() / num, _margins(margin_P, num)


def kto_loss(
    log_ratio_N: Tensor,
    is_good_N: Tensor,
    kl: float,
    *,
    num: int,
    beta: float = 0.1,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 7): λ (1 − σ(± β (r − z))), + for good answers.

    Args:
        log_ratio_N: r = log π(y|x) − log ref(y|x), sums over tokens.
        is_good_N: bool.
        kl: z, an estimate of KL(π ‖ ref), 0 or more: the mean r of answers put to other prompts.
    """
    z = max(kl, 0.0)
    sign_N = torch.where(is_good_N, 1.0, -1.0)
    weight_N = torch.where(is_good_N, good_weight, bad_weight)
    loss_N = weight_N * (1.0 - torch.sigmoid(sign_N * beta * (log_ratio_N - z)))
    reward_N = (beta * log_ratio_N).detach()
    metrics = {
        "reward_good": (reward_N * is_good_N).sum() / num,
        "reward_bad": (reward_N * ~is_good_N).sum() / num,
    }
    return loss_N.sum() / num, metrics


def orpo_loss(chosen_P: Tensor, rejected_P: Tensor, *, num: int, weight: float = 0.1) -> tuple[Tensor, Metrics]:
    """Odds-ratio preference optimisation (Hong et al. 2024, eq. 6 and 7): −c − λ log σ(log odds(c) − log odds(r)), without a
    reference.

    Args:
        chosen_P, rejected_P: mean log-probability a token, c and r; odds(x) = e^x / (1 − e^x).
    """
    logit_P = log_odds(chosen_P) - log_odds(rejected_P)
    loss_P = -chosen_P - weight * logsigmoid(logit_P)
    return loss_P.sum() / num, _margins(logit_P, num) | {"nll": -chosen_P.detach().sum() / num}


def log_odds(mean_logprob: Tensor) -> Tensor:
    """log(p / (1 − p)) of p = e^x, x < 0.

    >>> round(float(log_odds(torch.tensor(0.25).log())), 6) == round(float(torch.tensor(1 / 3).log()), 6)
    True
    """
    return mean_logprob - torch.log(-torch.expm1(mean_logprob.clamp(max=-1e-6)))


def simpo_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, num: int, beta: float = 2.0, gamma: float = 1.0
) -> tuple[Tensor, Metrics]:
    """Simple preference optimisation (Meng et al. 2024, eq. 6): −log σ(β c − β r − γ), c and r as in `orpo_loss`."""
    logit_P = beta * (chosen_P - rejected_P) - gamma
    return -logsigmoid(logit_P).sum() / num, _margins(logit_P + gamma, num)


def bradley_terry_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, num: int, centre: float = 0.0
) -> tuple[Tensor, Metrics]:
    """−log σ(r_chosen − r_rejected) (Ouyang et al. 2022, eq. 1), and centre · (r_chosen + r_rejected)², which keeps the
    rewards near 0 (Eisenstein et al. 2023, eq. 2)."""
    logit_P = chosen_P - rejected_P
    loss_P = -logsigmoid(logit_P) + centre * (chosen_P + rejected_P) ** 2
    return loss_P.sum() / num, _margins(logit_P, num)


def distribution_divergence(
    student_RV: Tensor, teacher_RV: Tensor, kind: str, *, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Divergence [R] of the student's distribution s over the vocabulary from the teacher's t, differentiable in the
    student's logits.

    forward_kl: KL(t ‖ s) (Hinton et al. 2015); reverse_kl: KL(s ‖ t); jsd: β KL(t ‖ m) + (1 − β) KL(s ‖ m) with
    m = β t + (1 − β) s (GKD, Agarwal et al. 2024, eq. 1). Not multiplied by temperature².

    Args:
        student_RV, teacher_RV: logits; divided by the temperature here.

    Raises:
        ConfigError: unknown kind, or beta outside (0, 1).
    """
    s_RV = (student_RV / temperature).log_softmax(1)
    t_RV = (teacher_RV / temperature).log_softmax(1).detach()
    match kind:
        case "forward_kl":
            return _kl(t_RV, s_RV)
        case "reverse_kl":
            return _kl(s_RV, t_RV)
        case "jsd":
            if not 0.0 < beta < 1.0:
                raise ConfigError(f"jsd beta={beta}; expected 0 < beta < 1; its ends are forward_kl and reverse_kl")
            m_RV = torch.logaddexp(t_RV + math.log(beta), s_RV + math.log1p(-beta))
            return beta * _kl(t_RV, m_RV) + (1.0 - beta) * _kl(s_RV, m_RV)
    raise ConfigError(unknown_name("divergence", kind, get_args(Divergence)))


def _kl(p_RV: Tensor, q_RV: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities."""
    return (p_RV.exp() * (p_RV - q_RV)).sum(1)


def _margins(logit_P: Tensor, num: int) -> Metrics:
    logit_P = logit_P.detach()
    return {"margin": logit_P.sum() / num, "accuracy": (logit_P > 0).float().sum() / num}
