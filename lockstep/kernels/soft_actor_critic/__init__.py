"""Gradients of a soft actor-critic minibatch of dense networks (continuous actions): gather, samples, targets, forwards
and backwards in two calls, one on each side of the critics' optimiser step.

The gradients have the bits of the composed ops. Legend: R rows of a replay buffer, B rows of a minibatch, D features,
A actions, E critics.
"""

from __future__ import annotations

from torch import Tensor

from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels import native
from lockstep.kernels.plan.spec import Head, Net
from lockstep.kernels.q_learning.rows import TransitionRows
from lockstep.kernels.soft_actor_critic import cpu, naive

__all__ = ["SoftGradients"]


class SoftGradients:
    """Sets `.grad` of critics and actor to the gradients of `critic_loss` and `sac_actor_loss` (Haarnoja et al. 2018) on
    a minibatch of transitions.

    Args:
        actor: from features to means and log standard deviations.
        critics: an ensemble from (features, action) to one value.
        target: an ensemble of the same sizes.
        head: "squashed".

    Raises:
        ConfigError: for another head.
        InputError: for networks that do not fit each other.
    """

    def __init__(self, actor: Net, critics: Net, target: Net, head: Head) -> None:
        _check(actor, critics, target, head)
        self._spec = (actor, critics, target)
        self._bounds = head.log_std_min, head.log_std_max
        self.actor_params = naive.parameters_of(actor)
        self.critic_params = naive.parameters_of(critics)
        self._compiled: cpu.Compiled | None = None
        self._batch: naive.Minibatch | None = None

    def critics(
        self, rows: TransitionRows, index_B: Tensor, normal_2BA: Tensor, alpha: float
    ) -> tuple[Tensor, float, float]:
        """Gradients of the critics on the rows `index_B` (int64) of `rows`, whose action is [R, A] float32.

        Args:
            normal_2BA: standard normals of the action sampled at the features, and of the one at the next features.
            alpha: weight of the entropy.

        Returns:
            (entropy of the sampled actions [B], critic loss, mean value). The tensors set as `.grad` are overwritten by
            the next call.

        Raises:
            InputError: rows or noise of the wrong shape, an index out of range.
        """
        self._batch = None
        if native.choose(rows.features) != "cpu":
            self._batch, out = naive.critic_gradients(*self._spec, self._bounds, rows, index_B, normal_2BA, alpha)
            return out
        if self._compiled is None or not self._compiled.holds():
            self._compiled = cpu.Compiled(*self._spec, self._bounds)
        return self._compiled.critics(rows, index_B, normal_2BA, alpha)

    def actor(self, alpha: float) -> tuple[float, float]:
        """Gradients of the actor on the minibatch of the last `critics` call, against the critics as they are now.

        Returns:
            (mean entropy, mean of the smallest value).
        """
        if self._batch is not None:
            return naive.actor_gradients(self._spec[0], self._spec[1], self._batch, alpha)
        assert self._compiled is not None, "the critics' gradients come first"
        return self._compiled.actor(alpha)


def _check(actor: Net, critics: Net, target: Net, head: Head) -> None:
    if head.kind != "squashed":
        raise ConfigError(f"head {head.kind!r} has no fused soft actor-critic gradients; expected 'squashed'")
    shapes = [[tuple(w.shape) for w in net.weights] for net in (critics, target)]
    if shapes[0] != shapes[1] or any(len(shape) != 3 for shape in shapes[0]):
        raise InputError(f"expected two ensembles of the same sizes; got weights {shapes}", field="weights")
    num_features, width = actor.weights[0].shape[-2], actor.weights[-1].shape[-1]
    if actor.weights[0].dim() != 2 or width % 2:
        raise InputError(f"the actor is one chain to 2A outputs; got {width}", field="actor")
    if (shapes[0][0][1], shapes[0][-1][2]) != (num_features + width // 2, 1):
        raise InputError(
            f"critics must map {num_features} features and {width // 2} actions to 1 value", field="critics"
        )
