"""Gradients of a Q-learning minibatch of dense networks: gather, forwards, Huber loss and backward in one call.

The gradients have the bits of the composed ops. Legend: R rows of a replay buffer, B rows of a minibatch, D features.
"""

from __future__ import annotations

from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.plan.spec import Net
from lockstep.kernels.q_learning import cpu, naive
from lockstep.kernels.q_learning.rows import TransitionRows

__all__ = ["QGradients", "TransitionRows"]


class QGradients:
    """Sets `.grad` of a Q-network's parameters to the gradient of the Huber loss (δ = 1), mean over a minibatch, of
    Q(s, a) against r + discount · Q'(s', best a'), Q' being the target network (Mnih et al. 2015).

    Args:
        online: from features to one value per action; its output activation is "none" as a rule.
        target: a chain of the same sizes.

    Raises:
        InputError: for ensembles, or networks of different sizes.
    """

    def __init__(self, online: Net, target: Net) -> None:
        shapes = [[tuple(w.shape) for w in net.weights] for net in (online, target)]
        if shapes[0] != shapes[1] or any(len(shape) != 2 for shape in shapes[0]):
            raise InputError(f"expected two plain chains of the same sizes; got weights {shapes}", field="weights")
        self._spec = (online, target)
        self.params = naive.parameters_of(online)
        self._compiled: cpu.Compiled | None = None

    def __call__(
        self, rows: TransitionRows, index_B: Tensor, *, weight_B: Tensor | None = None, is_double: bool = False
    ) -> tuple[Tensor, float, float]:
        """Gradients of the rows `index_B` (int64) of `rows`.

        Args:
            weight_B: factor of each row's loss.
            is_double: the best next action is the online network's (van Hasselt et al. 2016).

        Returns:
            (|TD error| [B], its mean, mean target). The tensors set as `.grad` are overwritten by the next call.

        Raises:
            InputError: rows of the wrong shape, an index or an action out of range.
        """
        if native.choose(rows.features) != "cpu":
            return naive.gradients(*self._spec, rows, index_B, weight_B, is_double)
        compiled = self._compiled
        if compiled is None or not compiled.holds():
            compiled = self._compiled = cpu.Compiled(*self._spec)
        return compiled(rows, index_B, weight_B, is_double)
