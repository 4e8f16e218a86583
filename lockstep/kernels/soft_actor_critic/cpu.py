"""Soft actor-critic gradients through the compiled kernels, into buffers that are allocated once.

Legend: R rows of a replay buffer, B rows of a minibatch, D features, A actions.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.mlp.cpu import Chain
from lockstep.kernels.plan.spec import Net
from lockstep.kernels.q_learning.rows import TransitionRows
from lockstep.kernels.soft_actor_critic.naive import parameters_of

_data_ptr = Tensor.data_ptr
_FLOAT_BYTES = 4


class _Struct(ctypes.Structure):
    """`LsSoftActorCritic` of csrc/lockstep.h."""

    _fields_ = (
        ("actor", ctypes.c_void_p),
        ("critics", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("features", ctypes.c_void_p),
        ("next_features", ctypes.c_void_p),
        ("action", ctypes.c_void_p),
        ("reward", ctypes.c_void_p),
        ("discount", ctypes.c_void_p),
        ("actor_dweights", ctypes.c_void_p),
        ("actor_dbiases", ctypes.c_void_p),
        ("critic_dweights", ctypes.c_void_p),
        ("critic_dbiases", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("log_std_min", ctypes.c_float),
        ("log_std_max", ctypes.c_float),
    )


class _Gradients:
    """Buffers for the gradients of one network, and where they lie."""

    def __init__(self, net: Net) -> None:
        self.params = parameters_of(net)
        self.grads = [torch.empty(p.shape, dtype=torch.float32) for p in self.params]
        at = {id(p): g.data_ptr() for p, g in zip(self.params, self.grads, strict=True)}
        lists = (net.weights, net.biases)
        self._arrays = [native.address_array([None if p is None else at[id(p)] for p in each]) for each in lists]
        self.dweights, self.dbiases = map(ctypes.addressof, self._arrays)

    def assign(self) -> None:
        for p, grad in zip(self.params, self.grads):  # noqa: B905  (made as long as each other)
            if p.grad is not grad:
                p.grad = grad


class Compiled:
    """The calls bound to the present addresses of parameters and gradient buffers, and to one set of rows at a time."""

    def __init__(self, actor: Net, critics: Net, target: Net, bounds: tuple[float, float]) -> None:
        nets = (actor, critics, target)
        self._chains = [Chain(n.weights, n.biases, n.activation, n.output_activation, n.dtype) for n in nets]
        self._num_features, self._num_actions = self._chains[0].sizes[0], self._chains[0].sizes[-1] // 2
        self._actor, self._critics = _Gradients(actor), _Gradients(critics)
        self._struct = _Struct(
            actor=self._chains[0].address,
            critics=self._chains[1].address,
            target=self._chains[2].address,
            actor_dweights=self._actor.dweights,
            actor_dbiases=self._actor.dbiases,
            critic_dweights=self._critics.dweights,
            critic_dbiases=self._critics.dbiases,
            log_std_min=bounds[0],
            log_std_max=bounds[1],
        )
        self._address = ctypes.addressof(self._struct)
        self._tensors = [p for net in nets for p in parameters_of(net)]
        self._addresses = [*map(_data_ptr, self._tensors)]
        self._stats = (ctypes.c_float * 2)()
        self._stats_address = ctypes.addressof(self._stats)
        self._memory = torch.empty(0)
        self._normal = torch.empty(0)
        self._num = 0
        self._rows: TransitionRows | None = None

    def holds(self) -> bool:
        """True while the parameters lie where they lay."""
        return self._addresses == [*map(_data_ptr, self._tensors)]

    def _bind(self, rows: TransitionRows) -> None:
        _check(rows, self._num_features, self._num_actions)
        self._rows = rows
        struct = self._struct
        struct.features, struct.next_features = rows.features.data_ptr(), rows.next_features.data_ptr()
        struct.action, struct.reward = rows.action.data_ptr(), rows.reward.data_ptr()
        struct.discount, struct.num_rows = rows.discount.data_ptr(), rows.features.shape[0]

    def _room_for(self, num: int) -> None:
        num_bytes = native.lib().ls_sac_memory(self._address, num)
        self._memory = torch.empty(num_bytes // _FLOAT_BYTES, dtype=torch.float32)
        self._struct.memory = self._memory.data_ptr()

    def critics(
        self, rows: TransitionRows, index_B: Tensor, normal_2BA: Tensor, alpha: float
    ) -> tuple[Tensor, float, float]:
        """Set every `.grad` of the critics; returns (entropy [B], critic loss, mean value)."""
        if rows is not self._rows:
            self._bind(rows)
        num = index_B.shape[0]
        if index_B.dtype is not torch.int64 or index_B.dim() != 1 or num == 0:
            raise InputError(f"index is {index_B.dtype} {tuple(index_B.shape)}; expected int64 [B]", field="index")
        shape = (2, num, self._num_actions)
        if normal_2BA.dtype is not torch.float32 or normal_2BA.shape != shape:
            raise InputError(
                f"normal is {normal_2BA.dtype} {tuple(normal_2BA.shape)}; expected float32 {shape}", field="normal"
            )
        if num != self._num:
            self._room_for(num)
            self._num = num
        index, self._normal = native.contiguous(index_B), native.contiguous(normal_2BA)
        entropy_B = torch.empty(num)
        at = index.data_ptr(), self._normal.data_ptr()
        bad = native.lib().ls_sac_critic_gradients(
            self._address, *at, alpha, num, entropy_B.data_ptr(), self._stats_address
        )
        if bad != -1:
            raise InputError(
                f"index[{bad}] is {int(index[bad])}; expected 0 <= index < {self._struct.num_rows}", field="index"
            )
        self._critics.assign()
        return entropy_B, self._stats[0], self._stats[1]

    def actor(self, alpha: float) -> tuple[float, float]:
        """Set every `.grad` of the actor; returns (mean entropy, mean smallest value)."""
        native.lib().ls_sac_actor_gradients(
            self._address, self._normal.data_ptr(), alpha, self._num, self._stats_address
        )
        self._actor.assign()
        return self._stats[0], self._stats[1]


def _check(rows: TransitionRows, num_features: int, num_actions: int) -> None:
    num = rows.features.shape[0]
    expected = (
        ("features", rows.features, (num, num_features)),
        ("next_features", rows.next_features, (num, num_features)),
        ("action", rows.action, (num, num_actions)),
        ("reward", rows.reward, (num,)),
        ("discount", rows.discount, (num,)),
    )
    for name, tensor, shape in expected:
        if not (tensor.dtype is torch.float32 and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous()):
            raise InputError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}; "
                f"expected contiguous float32 {shape} on the CPU",
                field=name,
            )
