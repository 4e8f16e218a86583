"""The gradient of the PPO loss of a dense actor and critic, without a graph.

For small networks autograd's bookkeeping costs more than the arithmetic. The same kernels are called in the same order
as autograd would call them, on arrays that are allocated once, so the gradients have the bits of the composed ops.

Legend: B samples, D features.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels import native
from lockstep.kernels.categorical import categorical_evaluate
from lockstep.kernels.gaussian import gaussian_evaluate
from lockstep.kernels.mlp import mlp
from lockstep.kernels.mlp.cpu import Chain, chain_of
from lockstep.kernels.plan.spec import Head, Net
from lockstep.kernels.ppo import ppo_surrogate


class _Side:
    """One network's buffers: output, what its backward needs, and parameter gradients."""

    def __init__(self, net: Net, num_rows: int) -> None:
        self.net = net
        chain = self.chain()
        self.y = torch.empty(num_rows, chain.sizes[-1])
        self.dy = torch.empty(num_rows, chain.sizes[-1])
        self.saved = torch.empty(num_rows * chain.saved_per_row)
        self.grads = [None if p is None else torch.zeros_like(p) for p in (*net.weights, *net.biases)]
        addresses = [None if g is None else g.data_ptr() for g in self.grads]
        self._dweights = native.address_array(addresses[: chain.num_layers])
        self._dbiases = native.address_array(addresses[chain.num_layers :])
        self._pointers = (self.y.data_ptr(), self.saved.data_ptr(), self.dy.data_ptr())

    def chain(self) -> Chain:
        net = self.net
        return chain_of(net.weights, net.biases, net.activation, net.output_activation, net.dtype)

    def forward(self, chain: Chain, x: int, num_rows: int) -> None:
        y, saved, _ = self._pointers
        native.lib().ls_mlp_forward(chain.address, x, y, saved, num_rows, 0)

    def backward(self, chain: Chain, x: int, num_rows: int) -> None:
        y, saved, dy = self._pointers
        native.lib().ls_mlp_backward(chain.address, x, y, saved, dy, None, self._dweights, self._dbiases, num_rows, 0)


class PPOStep:
    """Gradients and statistics of `ppo_surrogate` for a fixed number of samples.

    Args:
        actor, critic: separate networks on the same features; the critic has one output.
        head: "categorical", or "gaussian" with `log_std` as a parameter.
        num_rows: B.
        clip, value_clip, value_coef, entropy_coef: as in `ppo_surrogate`; attributes that may change between calls.

    Attributes:
        params: all parameters, actor weights and biases, critic weights and biases, then log_std.
        logprob [B], entropy [B]: of the last call.
    """

    def __init__(
        self,
        actor: Net,
        head: Head,
        critic: Net,
        num_rows: int,
        *,
        clip: float,
        value_clip: float | None,
        value_coef: float,
        entropy_coef: float,
    ) -> None:
        if head.kind not in ("categorical", "gaussian"):
            raise ConfigError(f"PPO takes a categorical or a gaussian head; got {head.kind!r}")
        if head.kind == "gaussian" and head.log_std is None:
            raise ConfigError("a gaussian head needs log_std")
        self.head, self.num_rows = head, num_rows
        self.clip, self.value_clip = clip, value_clip
        self.value_coef, self.entropy_coef = value_coef, entropy_coef
        self._actor, self._critic = _Side(actor, num_rows), _Side(critic, num_rows)
        width = self._actor.y.shape[1]
        self._sizes = tuple(head.nvec) if head.nvec else (width,)
        self._blocks = (ctypes.c_int64 * len(self._sizes))(*self._sizes)
        self.params = [p for net in (actor, critic) for p in (*net.weights, *net.biases) if p is not None]
        self._grads = [g for side in (self._actor, self._critic) for g in side.grads if g is not None]
        if head.log_std is not None:
            self.params.append(head.log_std)
            self._grads.append(torch.zeros_like(head.log_std))
        self.logprob, self.entropy = torch.zeros(num_rows), torch.zeros(num_rows)
        self._dlogprob, self._dentropy = torch.zeros(num_rows), torch.zeros(num_rows)
        self._loss, self.stats = torch.zeros(()), torch.zeros(6)

    def run(
        self,
        features_BD: Tensor,
        actions: Tensor,
        old_logprob_B: Tensor,
        advantage_B: Tensor,
        return_B: Tensor,
        old_value_B: Tensor,
        mask_B: Tensor | None = None,
    ) -> Tensor:
        """Set `.grad` of every parameter; returns the six statistics of `ppo_surrogate`, overwritten by the next call.

        Args:
            actions: int64 [B] or [B, blocks] for a categorical head, float32 [B, A] for a gaussian one.
        """
        self._check(features_BD, actions, old_logprob_B, advantage_B, return_B, old_value_B, mask_B)
        columns = (old_logprob_B, advantage_B, return_B, old_value_B)
        if native.choose(features_BD) == "cpu":
            self._run_fast(features_BD, actions, columns, mask_B)
            for p, g in zip(self.params, self._grads, strict=True):
                p.grad = g
        else:
            self._run_composed(features_BD, actions, columns, mask_B)
        return self.stats

    def _run_fast(self, features: Tensor, actions: Tensor, columns: tuple[Tensor, ...], mask: Tensor | None) -> None:
        lib, num = native.lib(), self.num_rows
        features, actions = native.contiguous(features), native.contiguous(actions)
        constants = [native.contiguous(t) for t in columns]
        mask = None if mask is None else native.contiguous(mask)
        actor, critic = self._actor, self._critic
        actor_chain, critic_chain = actor.chain(), critic.chain()
        x, act = features.data_ptr(), actions.data_ptr()
        actor.forward(actor_chain, x, num)
        critic.forward(critic_chain, x, num)
        self._evaluate(act)
        lib.ls_ppo_surrogate(
            self.logprob.data_ptr(),
            self.entropy.data_ptr(),
            critic.y.data_ptr(),
            *[t.data_ptr() for t in constants],
            None if mask is None else mask.data_ptr(),
            self.clip,
            -1.0 if self.value_clip is None else self.value_clip,
            self.value_coef,
            self.entropy_coef,
            num,
            self._loss.data_ptr(),
            self.stats.data_ptr(),
            self._dlogprob.data_ptr(),
            self._dentropy.data_ptr(),
            critic.dy.data_ptr(),
        )
        self._evaluate_backward(act)
        actor.backward(actor_chain, x, num)
        critic.backward(critic_chain, x, num)

    def _evaluate(self, actions: int) -> None:
        lib, out, num = native.lib(), self._actor.y, self.num_rows
        logprob, entropy = self.logprob.data_ptr(), self.entropy.data_ptr()
        if self.head.log_std is not None:
            log_std = self.head.log_std.data_ptr()
            lib.ls_gaussian_evaluate(out.data_ptr(), log_std, 0, actions, logprob, entropy, num, out.shape[1])
            return
        blocks = len(self._sizes)
        bad = lib.ls_categorical_evaluate(out.data_ptr(), actions, logprob, entropy, num, self._blocks, blocks)
        if bad >= 0:
            raise InputError(f"the action of row {bad} is not below {list(self._sizes)}", field="actions")

    def _evaluate_backward(self, actions: int) -> None:
        lib, out, num = native.lib(), self._actor.y, self.num_rows
        dlogprob, dentropy, dout = self._dlogprob.data_ptr(), self._dentropy.data_ptr(), self._actor.dy.data_ptr()
        if self.head.log_std is not None:
            log_std, dlog_std = self.head.log_std.data_ptr(), self._grads[-1].data_ptr()
            lib.ls_gaussian_backward(
                out.data_ptr(), log_std, 0, actions, dlogprob, dentropy, dout, dlog_std, num, out.shape[1]
            )
            return
        lib.ls_categorical_backward(
            out.data_ptr(), actions, dlogprob, dentropy, dout, num, self._blocks, len(self._sizes)
        )

    def _run_composed(
        self, features: Tensor, actions: Tensor, columns: tuple[Tensor, ...], mask: Tensor | None
    ) -> None:
        """The definition: the public ops under autograd."""
        outputs = []
        for net in (self._actor.net, self._critic.net):
            outputs.append(mlp(features, net.weights, net.biases, net.activation, net.output_activation, net.dtype))
        if self.head.log_std is not None:
            logprob, entropy = gaussian_evaluate(outputs[0], self.head.log_std, actions)
        else:
            logprob, entropy = categorical_evaluate(outputs[0], actions, self._sizes)
        value, (old_logprob, advantage, returns, old_value) = outputs[1].view(-1), columns
        scalars = (self.clip, self.value_clip, self.value_coef, self.entropy_coef)
        loss, stats = ppo_surrogate(
            logprob, entropy, value, old_logprob, advantage, returns, old_value, *scalars, mask_B=mask
        )
        for p, g in zip(self.params, torch.autograd.grad(loss, self.params), strict=True):
            p.grad = g
        for target, source in ((self.stats, stats), (self.logprob, logprob), (self.entropy, entropy)):
            target.copy_(source.detach())

    def _check(self, features: Tensor, actions: Tensor, *columns: Tensor | None) -> None:
        num = self.num_rows
        width = self._actor.net.weights[0].shape[-2]
        if features.shape != (num, width) or features.dtype is not torch.float32:
            raise InputError(
                f"features are {features.dtype} {tuple(features.shape)}; expected float32 {(num, width)}",
                field="features",
            )
        gaussian = self.head.log_std is not None
        per_row = self._actor.y.shape[1] if gaussian else len(self._sizes)
        dtype = torch.float32 if gaussian else torch.int64
        if actions.dtype is not dtype or actions.numel() != num * per_row:
            raise InputError(
                f"actions are {actions.dtype} {tuple(actions.shape)}; expected {dtype} with {per_row} per row of {num}",
                field="actions",
            )
        *floats, mask = columns
        for column in floats:
            if column is None or column.shape != (num,) or column.dtype is not torch.float32:
                raise InputError(f"old_logprob, advantage, return and old_value are float32 [{num}]", field="advantage")
        if mask is not None and (mask.shape != (num,) or mask.dtype is not torch.bool):
            raise InputError(f"mask is {mask.dtype} {tuple(mask.shape)}; expected bool [{num}]", field="mask")
