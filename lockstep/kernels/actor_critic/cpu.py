"""Minibatch gradients through the compiled kernels, into buffers that are allocated once.

Legend: R rows of a rollout, B rows of a minibatch, D features, A actor outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.actor_critic.rows import RolloutRows
from lockstep.kernels.mlp.cpu import Chain
from lockstep.kernels.plan.spec import HEADS, Head, Net

_data_ptr = Tensor.data_ptr
_GRADIENT_FIELDS = ("actor_dweights", "actor_dbiases", "critic_dweights", "critic_dbiases")


class _Struct(ctypes.Structure):
    """`LsActorCritic` of csrc/lockstep.h."""

    _fields_ = (
        ("actor", ctypes.c_void_p),
        ("critic", ctypes.c_void_p),
        ("log_std", ctypes.c_void_p),
        ("block_sizes", ctypes.c_void_p),
        ("features", ctypes.c_void_p),
        ("action", ctypes.c_void_p),
        ("logprob", ctypes.c_void_p),
        ("advantage", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("actor_dweights", ctypes.c_void_p),
        ("actor_dbiases", ctypes.c_void_p),
        ("critic_dweights", ctypes.c_void_p),
        ("critic_dbiases", ctypes.c_void_p),
        ("dlog_std", ctypes.c_void_p),
        ("head", ctypes.c_int32),
        ("normalise", ctypes.c_int32),
        ("clip", ctypes.c_float),
        ("value_clip", ctypes.c_float),
        ("value_coef", ctypes.c_float),
        ("entropy_coef", ctypes.c_float),
        ("num_rows", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
    )


class Compiled:
    """The call bound to the present addresses of parameters and gradient buffers, and to one rollout at a time."""

    def __init__(self, actor: Net, critic: Net, head: Head, params: Sequence[Tensor]) -> None:
        nets = (actor, critic)
        self._chains = [Chain(n.weights, n.biases, n.activation, n.output_activation, n.dtype) for n in nets]
        self._head = head
        self._sizes = head.nvec or (self._chains[0].sizes[-1],)
        self._blocks = (ctypes.c_int64 * len(self._sizes))(*self._sizes)
        self._params = list(params)
        self._grads = [torch.empty(p.shape, dtype=torch.float32) for p in params]
        of = {id(p): g.data_ptr() for p, g in zip(params, self._grads, strict=True)}
        lists = (actor.weights, actor.biases, critic.weights, critic.biases)
        self._arrays = [native.address_array([None if p is None else of[id(p)] for p in each]) for each in lists]
        self._struct = _Struct(
            actor=self._chains[0].address,
            critic=self._chains[1].address,
            log_std=None if head.log_std is None else head.log_std.data_ptr(),
            block_sizes=ctypes.addressof(self._blocks),
            dlog_std=None if head.log_std is None else of[id(head.log_std)],
            head=HEADS.index(head.kind),
            num_blocks=len(self._sizes),
            **dict(zip(_GRADIENT_FIELDS, map(ctypes.addressof, self._arrays), strict=True)),
        )
        self._address = ctypes.addressof(self._struct)
        self._addresses = [*map(_data_ptr, self._params)]
        self._rows: RolloutRows | None = None
        self._function = native.lib().ls_actor_critic_gradients

    def holds(self) -> bool:
        """True while the parameters lie where they lay."""
        return self._addresses == [*map(_data_ptr, self._params)]

    def _bind(self, rows: RolloutRows) -> None:
        tensors = _checked(rows, self._chains[0].sizes, self._head)
        self._rows = rows
        struct = self._struct
        struct.features, struct.action, struct.logprob, struct.advantage, struct.value = map(_data_ptr, tensors)
        struct.num_rows = rows.features.shape[0]

    def __call__(
        self,
        rows: RolloutRows,
        index_B: Tensor,
        scalars: tuple[float, float, float, float],
        normalise_advantage: bool,
    ) -> Tensor:
        """Set every `.grad`; returns stats [6]."""
        if rows is not self._rows:
            self._bind(rows)
        if index_B.dtype is not torch.int64 or index_B.dim() != 1:
            raise InputError(f"index is {index_B.dtype} {tuple(index_B.shape)}; expected int64 [B]", field="index")
        index = native.contiguous(index_B)
        struct = self._struct
        struct.clip, struct.value_clip, struct.value_coef, struct.entropy_coef = scalars
        struct.normalise = normalise_advantage
        stats = torch.empty(6)
        bad = self._function(self._address, index.data_ptr(), index.shape[0], stats.data_ptr())
        if bad != -1:
            self._refuse(rows, index, bad)
        for p, grad in zip(self._params, self._grads):  # noqa: B905  (made as long as each other)
            if p.grad is not grad:
                p.grad = grad
        return stats

    def _refuse(self, rows: RolloutRows, index: Tensor, bad: int) -> None:
        if bad < -1:
            raise InputError(
                f"index[{-2 - bad}] is {int(index[-2 - bad])}; expected 0 <= index < {self._struct.num_rows}",
                field="index",
            )
        raise InputError(
            f"action of row {int(index[bad])} is {rows.action[index[bad]].tolist()}; "
            f"expected 0 <= action < {list(self._sizes)}",
            field="action",
        )


def _checked(rows: RolloutRows, sizes: tuple[int, ...], head: Head) -> list[Tensor]:
    """(features, action, logprob, advantage, value), whose memory the kernel may read."""
    num = rows.features.shape[0]
    action_type = torch.float32 if head.kind == "gaussian" else torch.int64
    per_row = sizes[-1] if head.kind == "gaussian" else len(head.nvec or (0,))
    expected = (
        ("features", rows.features, torch.float32, num * sizes[0]),
        ("action", rows.action, action_type, num * per_row),
        ("logprob", rows.logprob, torch.float32, num),
        ("advantage", rows.advantage, torch.float32, num),
        ("value", rows.value, torch.float32, num),
    )
    for name, tensor, dtype, numel in expected:
        fits = tensor.dtype is dtype and tensor.numel() == numel and tensor.shape[:1] == (num,)
        if not (fits and tensor.is_cpu and tensor.is_contiguous()):
            raise InputError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}; "
                f"expected contiguous {dtype} on the CPU, {num} rows of {numel // max(num, 1)}",
                field=name,
            )
    return [tensor for _, tensor, _, _ in expected]
