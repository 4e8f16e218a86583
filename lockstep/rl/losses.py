"""Losses of control policies: tensors in, (loss, metrics) out. No state, no configuration objects.

Sign: every loss is minimised. Mean: over the rows given, or over the rows where a mask is true. Who normalises
advantages is the caller.

Legend: B rows (transitions), A actions, Z atoms or quantiles, E critics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep import kernels
from lockstep.models.control.heads import (
    Deterministic,
    Gaussian,
    Head,
    MultiCategorical,
    QValues,
    SquashedGaussian,
)

Metrics = dict[str, Tensor]


def ppo_loss(
    logprob_B: Tensor,
    entropy_B: Tensor,
    value_B: Tensor,
    *,
    old_logprob_B: Tensor,
    advantage_B: Tensor,
    return_B: Tensor,
    old_value_B: Tensor,
    clip: float,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    mask_B: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate of PPO (Schulman et al. 2017, eq. 7 and 9) with squared value error.

    L = −mean min(r A, clip(r, 1±ε) A) + c_v mean ½·2·(V − R)² − c_e mean H, r = exp(logprob − old_logprob). The value
    error is (V − R)² as in the reference implementations' `value_coef` = 0.5 convention; with `value_clip` the larger of
    clipped and unclipped error. `approx_kl` is the k3 estimator (Schulman 2020), `ratio_max_dev` = max |r − 1|.
    """
    loss, stats = kernels.ppo_surrogate(
        logprob_B,
        entropy_B,
        value_B,
        old_logprob_B,
        advantage_B,
        return_B,
        old_value_B,
        clip,
        value_clip,
        value_coef,
        entropy_coef,
        mask_B,
    )
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "ratio_max_dev")
    return loss, dict(zip(names, stats.unbind(0), strict=True))


def a2c_loss(
    logprob_B: Tensor,
    entropy_B: Tensor,
    value_B: Tensor,
    *,
    advantage_B: Tensor,
    return_B: Tensor,
    value_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Metrics]:
    """Advantage actor-critic (Mnih et al. 2016): −mean logprob·A + c_v mean (V − R)² − c_e mean H."""
    policy_loss = -(logprob_B * advantage_B).mean()
    value_loss = ((value_B - return_B) ** 2).mean()
    entropy = entropy_B.mean()
    loss = policy_loss + value_coef * value_loss - entropy_coef * entropy
    return loss, _detach(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)


def td_loss(values_B: Tensor, target_B: Tensor, weight_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Huber loss (δ = 1) of values against targets, mean over B; returns (loss, |TD error| [B])."""
    error_B = values_B - target_B
    loss_B = torch.nn.functional.huber_loss(values_B, target_B, reduction="none")
    loss = loss_B.mean() if weight_B is None else (loss_B * weight_B).mean()
    return loss, error_B.detach().abs()


def td_gradient(
    values_BA: Tensor, action_B: Tensor, target_B: Tensor, weight_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of `td_loss` with respect to all action values, without building a graph: half the time.

    Returns:
        (gradient [B, A], zero but for the actions taken; |TD error| [B]).
    """
    values_BA, index_B1 = values_BA.detach(), action_B.unsqueeze(1)
    error_B1 = values_BA.gather(1, index_B1).sub_(target_B.unsqueeze(1))
    slope_B1 = error_B1.clamp(-1.0, 1.0).mul_(1.0 / len(action_B))
    if weight_B is not None:
        slope_B1.mul_(weight_B.unsqueeze(1))
    gradient_BA = torch.zeros_like(values_BA).scatter_(1, index_B1, slope_B1)
    return gradient_BA, error_B1.squeeze(1).abs_()


def categorical_td_loss(logits_BZ: Tensor, target_BZ: Tensor, weight_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of C51 (Bellemare et al. 2017, alg. 1); returns (loss, per-row cross-entropy [B] as priority)."""
    loss_B = -(target_BZ * torch.log_softmax(logits_BZ, dim=1)).sum(1)
    loss = loss_B.mean() if weight_B is None else (loss_B * weight_B).mean()
    return loss, loss_B.detach()


def quantile_huber_loss(
    quantiles_BZ: Tensor, target_BY: Tensor, weight_B: Tensor | None = None, *, sum_over_quantiles: bool = True
) -> tuple[Tensor, Tensor]:
    """Quantile regression with Huber κ = 1 (Dabney et al. 2018, eq. 10).

    Args:
        quantiles_BZ: predictions at the midpoints (2i + 1) / 2Z.
        target_BY: samples of the target distribution, no gradient.
        sum_over_quantiles: sum over Z (QR-DQN) rather than mean (TQC).
    """
    num = quantiles_BZ.shape[1]
    tau_Z = (torch.arange(num, dtype=quantiles_BZ.dtype) + 0.5) / num
    pairs = quantiles_BZ.unsqueeze(2).expand(-1, -1, target_BY.shape[1]), target_BY.unsqueeze(1).expand(-1, num, -1)
    tau = tau_Z.view(1, -1, 1)
    weight_BZY = torch.where(pairs[1] < pairs[0].detach(), 1.0 - tau, tau)
    huber_BZY = torch.nn.functional.huber_loss(*pairs, reduction="none")
    per_quantile_BZ = (weight_BZY * huber_BZY).mean(2)
    loss_B = per_quantile_BZ.sum(1) if sum_over_quantiles else per_quantile_BZ.mean(1)
    loss = loss_B.mean() if weight_B is None else (loss_B * weight_B).mean()
    return loss, loss_B.detach()


def critic_loss(values_EB: Tensor, target_B: Tensor) -> tuple[Tensor, Metrics]:
    """Squared error of every critic against one target, ½ Σ_E mean_B (Q − y)², as in SAC and TD3 implementations."""
    error_EB = values_EB - target_B
    loss = 0.5 * (error_EB**2).mean(1).sum()
    return loss, _detach(critic_loss=loss, q_mean=values_EB.mean())


def critic_gradient(values_EB: Tensor, target_B: Tensor) -> tuple[Tensor, Metrics]:
    """Gradient [E, B] of `critic_loss` with respect to the values, without building a graph, and its metrics."""
    values_EB = values_EB.detach()
    error_EB = values_EB - target_B
    gradient_EB = error_EB * (1.0 / target_B.shape[0])
    loss = 0.5 * torch.dot(error_EB.view(-1), gradient_EB.view(-1))
    return gradient_EB, {"critic_loss": loss, "q_mean": values_EB.mean()}


def sac_actor_gradients(entropy_B: Tensor, q_B: Tensor, alpha: Tensor) -> tuple[tuple[Tensor, Tensor], Metrics]:
    """Gradients [B] of `sac_actor_loss` with respect to (entropy, Q), constants of the batch, and its metrics."""
    rate = -1.0 / q_B.shape[0]
    entropy, q = entropy_B.detach().mean(), q_B.detach().mean()
    gradients = (alpha * rate).expand_as(entropy_B), torch.full_like(q_B, rate)
    return gradients, {"actor_loss": -alpha * entropy - q, "entropy": entropy}


def sac_actor_loss(logprob_B: Tensor, q_B: Tensor, alpha: Tensor) -> tuple[Tensor, Metrics]:
    """mean(α logprob − Q) (Haarnoja et al. 2018, eq. 12), Q the minimum over critics at the reparameterised action."""
    loss = (alpha * logprob_B - q_B).mean()
    return loss, _detach(actor_loss=loss, entropy=-logprob_B.mean())


def temperature_loss(log_alpha: Tensor, logprob_B: Tensor, target_entropy: float) -> Tensor:
    """−mean log α (logprob + target entropy) (Haarnoja et al. 2018b, eq. 18 in its usual log-α form)."""
    return -(log_alpha * (logprob_B.detach() + target_entropy)).mean()


def expectile_loss(value_B: Tensor, target_B: Tensor, expectile: float) -> tuple[Tensor, Metrics]:
    """Asymmetric squared error |τ − 1(u < 0)| u², u = target − V (IQL, Kostrikov et al. 2022, eq. 5)."""
    error_B = target_B - value_B
    weight_B = torch.where(error_B > 0, expectile, 1.0 - expectile)
    loss = (weight_B * error_B**2).mean()
    return loss, _detach(value_loss=loss, v_mean=value_B.mean())


def weighted_regression_loss(
    logprob_B: Tensor, advantage_B: Tensor, *, temperature: float, max_weight: float
) -> tuple[Tensor, Metrics]:
    """−mean min(exp(β A), w_max) logprob (IQL, Kostrikov et al. 2022, eq. 7)."""
    weight_B = torch.exp(temperature * advantage_B).clamp(max=max_weight)
    loss = -(weight_B * logprob_B).mean()
    return loss, _detach(actor_loss=loss, weight_mean=weight_B.mean())


def cloning_loss(logprob_B: Tensor, entropy_B: Tensor, *, entropy_coef: float) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the data's actions, minus an entropy bonus."""
    loss = -logprob_B.mean() - entropy_coef * entropy_B.mean()
    return loss, _detach(actor_loss=loss, entropy=entropy_B.mean())


def distillation_loss(
    head: Head, params_BP: Tensor, teacher_BP: Tensor, log_stds_A: tuple[Tensor, Tensor], *, temperature: float
) -> tuple[Tensor, Metrics]:
    """KL(teacher || student) of the action distributions, mean over rows (Rusu et al. 2015).

    Choices: of the softmax of logits; of action values, of the softmax of values / temperature, as in the paper. Normal
    distributions: of the normals (tanh of both leaves it unchanged). Deterministic actions: the squared error.

    Args:
        head: of both; action values [B, n] in place of a Q head's parameters.
        params_BP: the student's parameters, masked choices included.
        teacher_BP: the teacher's.
        log_stds_A: (student's, teacher's) log standard deviation [A] where the head has it apart; else unused.
        temperature: of action values.
    """
    match head:
        case Deterministic():
            loss = (params_BP - teacher_BP).square().sum(-1).mean()
        case Gaussian() | SquashedGaussian():
            if isinstance(head, SquashedGaussian):
                (mean, log_std), (wanted, wanted_log_std) = head.split(params_BP), head.split(teacher_BP)
            else:
                (mean, wanted), (log_std, wanted_log_std) = (params_BP, teacher_BP), log_stds_A
            ratio = (2.0 * (wanted_log_std - log_std)).exp()
            distance = ((wanted - mean) * (-log_std).exp()).square()
            loss = 0.5 * (ratio + distance - 1.0 - 2.0 * (wanted_log_std - log_std)).sum(-1).mean()
        case _:
            sizes = list(head.nvec) if isinstance(head, MultiCategorical) else [params_BP.shape[1]]
            scale = 1.0 / temperature if isinstance(head, QValues) else 1.0
            loss = params_BP.new_zeros(())
            for logits, wanted in zip(torch.split(params_BP, sizes, 1), torch.split(teacher_BP, sizes, 1), strict=True):
                log_p, log_q = torch.log_softmax(wanted * scale, 1), torch.log_softmax(logits * scale, 1)
                loss = loss + (log_p.exp() * (log_p - log_q)).sum(1).mean()
    return loss, _detach(actor_loss=loss)


def _detach(**metrics: Tensor) -> Metrics:
    return {name: value.detach() for name, value in metrics.items()}
