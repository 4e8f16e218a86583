"""Gradients of a PPO minibatch of a dense actor and critic: gather, forward, loss and backward in one call.

For small networks: a 64-64 actor and critic on 256 rows cost a fifth of a millisecond, of which autograd alone would take
as much again. The gradients have the bits of the composed ops.

Legend: R rows of a rollout, B rows of a minibatch, D features, A actions.
"""

from __future__ import annotations

from torch import Tensor

from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels import native
from lockstep.kernels.actor_critic import cpu, naive
from lockstep.kernels.actor_critic.rows import RolloutRows
from lockstep.kernels.plan.spec import Head, Net

__all__ = ["ActorCriticGradients", "RolloutRows"]


class ActorCriticGradients:
    """Sets `.grad` of an actor's and a critic's parameters to the gradient of `ppo_surrogate` on a minibatch.

    Args:
        actor: from features to what the head reads.
        critic: from the same features to one value.
        head: "categorical" or "gaussian".

    Raises:
        ConfigError: for another head.
        InputError: for networks that do not fit each other or the head.
    """

    def __init__(self, actor: Net, critic: Net, head: Head) -> None:
        _check(actor, critic, head)
        self._spec = (actor, critic, head)
        self.params = naive.parameters_of(*self._spec)
        self._compiled: cpu.Compiled | None = None

    def __call__(
        self,
        rows: RolloutRows,
        index_B: Tensor,
        *,
        clip: float,
        value_clip: float | None,
        value_coef: float,
        entropy_coef: float,
        normalise_advantage: bool,
    ) -> Tensor:
        """Gradients of the rows `index_B` (int64) of `rows`; the other arguments as in `ppo_surrogate`.

        Args:
            normalise_advantage: advantages of the minibatch are brought to zero mean and unit deviation first.

        Returns:
            stats [6] of `ppo_surrogate`. The tensors set as `.grad` are overwritten by the next call.

        Raises:
            InputError: rows of the wrong shape, an index or an action out of range.
        """
        scalars = (clip, -1.0 if value_clip is None else value_clip, value_coef, entropy_coef)
        if native.choose(rows.features) != "cpu":
            return naive.gradients(*self._spec, rows, index_B, scalars, normalise_advantage)
        compiled = self._compiled
        if compiled is None or not compiled.holds():
            compiled = self._compiled = cpu.Compiled(*self._spec, self.params)
        return compiled(rows, index_B, scalars, normalise_advantage)


def _check(actor: Net, critic: Net, head: Head) -> None:
    if head.kind not in ("categorical", "gaussian"):
        raise ConfigError(f"head {head.kind!r} has no fused gradients; expected 'categorical' or 'gaussian'")
    num_obs, width = actor.weights[0].shape[-2], actor.weights[-1].shape[-1]
    if any(net.weights[0].dim() != 2 for net in (actor, critic)):
        raise InputError("fused gradients take plain chains [K, N], not ensembles", field="weights")
    if (critic.weights[0].shape[-2], critic.weights[-1].shape[-1]) != (num_obs, 1):
        raise InputError(f"the critic must map {num_obs} features to 1 value", field="critic")
    if head.kind == "gaussian" and (head.log_std is None or tuple(head.log_std.shape) != (width,)):
        got = None if head.log_std is None else tuple(head.log_std.shape)
        raise InputError(f"a gaussian head needs log_std [{width}]; got {got}", field="log_std")
    if head.nvec is not None and sum(head.nvec) != width:
        raise InputError(f"the actor has {width} outputs; nvec {head.nvec} needs {sum(head.nvec)}", field="nvec")
