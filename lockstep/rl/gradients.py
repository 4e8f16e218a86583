"""Gradients of PPO's minibatches: one compiled call where the policy is a plain dense actor and critic, autograd elsewhere.

Both give the same bits, so the choice is a matter of speed alone.

Legend: R rows of a rollout, B minibatch rows, T steps, M environments of a minibatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.tree import tree_map
from lockstep.layers.linear import MLP
from lockstep.models.control.heads import Categorical, Gaussian, MultiCategorical
from lockstep.models.control.plan import head_of, net_of
from lockstep.models.control.policy import Policy
from lockstep.rl.losses import ppo_loss


@dataclass(frozen=True)
class RowBatch:
    """Independent transitions: those of `rows` that `index` [B] names."""

    rows: kernels.RolloutRows
    index: Tensor


@dataclass(frozen=True)
class SequenceBatch:
    """T steps of M environments in order, from `state` on; tensors are [T, M, ...]. `mask` None: every row counts."""

    features: Any
    action: Tensor
    logprob: Tensor
    advantage: Tensor
    value: Tensor
    mask: Tensor | None
    state: dict[str, Tensor]
    starts: Tensor


class PPOGradients:
    """Sets `.grad` of a policy's parameters to the gradient of `ppo_loss` on a minibatch."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._params = list(policy.parameters())
        self._fused = _fused(policy)

    def __call__(
        self,
        batch: RowBatch | SequenceBatch,
        *,
        clip: float,
        value_clip: float | None,
        value_coef: float,
        entropy_coef: float,
        normalise_advantage: bool,
    ) -> dict[str, Tensor]:
        """Metrics of `ppo_loss`, whose arguments these are.

        Args:
            normalise_advantage: advantages of the minibatch to zero mean and unit deviation.
        """
        if self._fused is not None and isinstance(batch, RowBatch):
            stats = self._fused(
                batch.rows,
                batch.index,
                clip=clip,
                value_clip=value_clip,
                value_coef=value_coef,
                entropy_coef=entropy_coef,
                normalise_advantage=normalise_advantage,
            )
            return dict(zip(kernels.PPO_STATS, stats.unbind(0), strict=True))
        outputs, (logprob, advantage, value), mask = self._outputs(batch)
        loss, metrics = ppo_loss(
            *outputs,
            old_logprob_B=logprob,
            advantage_B=kernels.normalise(advantage, mask) if normalise_advantage else advantage,
            return_B=advantage + value,
            old_value_B=value,
            clip=clip,
            value_clip=value_clip,
            value_coef=value_coef,
            entropy_coef=entropy_coef,
            mask_B=mask,
        )
        for p in self._params:
            p.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return metrics

    def _outputs(
        self, batch: RowBatch | SequenceBatch
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """(logprob, entropy, value) under the current weights; (logprob, advantage, value) as recorded; mask. All [B]."""
        if isinstance(batch, RowBatch):
            rows, index = batch.rows, batch.index
            features = tree_map(lambda x: x[index], rows.features)
            outputs = self.policy.evaluate(features, rows.action[index])
            return outputs, (rows.logprob[index], rows.advantage[index], rows.value[index]), None
        outs = self.policy.evaluate_sequence(batch.features, batch.action, batch.state, batch.starts)
        logprob, entropy, value = (x.flatten() for x in outs)
        recorded = (batch.logprob.flatten(), batch.advantage.flatten(), batch.value.flatten())
        return (logprob, entropy, value), recorded, None if batch.mask is None else batch.mask.flatten()


def _fused(policy: Policy) -> kernels.ActorCriticGradients | None:
    """The compiled call for `policy`, or None where its network or its head needs autograd."""
    dense = isinstance(policy.actor, MLP) and isinstance(policy.critic, MLP) and policy.core is None
    if not dense or not policy.preprocess.features.plain:
        return None
    if not isinstance(policy.head, Categorical | MultiCategorical | Gaussian):
        return None
    if not all(p.requires_grad and p.is_cpu and p.dtype is torch.float32 for p in policy.parameters()):
        return None
    head = head_of(policy)
    assert isinstance(policy.actor, MLP)
    assert isinstance(policy.critic, MLP)
    assert head is not None
    return kernels.ActorCriticGradients(net_of(policy.actor), net_of(policy.critic), head)
