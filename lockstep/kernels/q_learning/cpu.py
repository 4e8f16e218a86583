"""Q-learning gradients through the compiled kernels, into buffers that are allocated once.

Legend: R rows of a replay buffer, B rows of a minibatch.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.mlp.cpu import Chain
from lockstep.kernels.plan.spec import Net
from lockstep.kernels.q_learning.naive import parameters_of
from lockstep.kernels.q_learning.rows import TransitionRows

_data_ptr = Tensor.data_ptr


class _Struct(ctypes.Structure):
    """`LsQLearning` of csrc/lockstep.h."""

    _fields_ = (
        ("online", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("features", ctypes.c_void_p),
        ("next_features", ctypes.c_void_p),
        ("action", ctypes.c_void_p),
        ("reward", ctypes.c_void_p),
        ("discount", ctypes.c_void_p),
        ("dweights", ctypes.c_void_p),
        ("dbiases", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("is_double", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Compiled:
    """The call bound to the present addresses of parameters and gradient buffers, and to one set of rows at a time."""

    def __init__(self, online: Net, target: Net) -> None:
        nets = (online, target)
        self._chains = [Chain(n.weights, n.biases, n.activation, n.output_activation, n.dtype) for n in nets]
        self._params = parameters_of(online)
        self._grads = [torch.empty(p.shape, dtype=torch.float32) for p in self._params]
        of = {id(p): g.data_ptr() for p, g in zip(self._params, self._grads, strict=True)}
        lists = (online.weights, online.biases)
        self._arrays = [native.address_array([None if p is None else of[id(p)] for p in each]) for each in lists]
        self._struct = _Struct(
            online=self._chains[0].address,
            target=self._chains[1].address,
            dweights=ctypes.addressof(self._arrays[0]),
            dbiases=ctypes.addressof(self._arrays[1]),
        )
        self._address = ctypes.addressof(self._struct)
        self._tensors = [*self._params, *parameters_of(target)]
        self._addresses = [*map(_data_ptr, self._tensors)]
        self._stats = (ctypes.c_float * 2)()
        self._stats_address = ctypes.addressof(self._stats)
        self._rows: TransitionRows | None = None
        self._function = native.lib().ls_q_gradients

    def holds(self) -> bool:
        """True while the parameters lie where they lay."""
        return self._addresses == [*map(_data_ptr, self._tensors)]

    def _bind(self, rows: TransitionRows) -> None:
        _check(rows, self._chains[0].sizes[0])
        self._rows = rows
        struct = self._struct
        struct.features, struct.next_features = rows.features.data_ptr(), rows.next_features.data_ptr()
        struct.action, struct.reward = rows.action.data_ptr(), rows.reward.data_ptr()
        struct.discount, struct.num_rows = rows.discount.data_ptr(), rows.features.shape[0]

    def __call__(
        self, rows: TransitionRows, index_B: Tensor, weight_B: Tensor | None, is_double: bool
    ) -> tuple[Tensor, float, float]:
        """Set every `.grad`; returns (|TD error| [B], its mean, mean target)."""
        if rows is not self._rows:
            self._bind(rows)
        num = index_B.shape[0]
        if index_B.dtype is not torch.int64 or index_B.dim() != 1 or num == 0:
            raise InputError(f"index is {index_B.dtype} {tuple(index_B.shape)}; expected int64 [B]", field="index")
        if weight_B is not None:
            if weight_B.dtype is not torch.float32 or weight_B.shape != index_B.shape:
                raise InputError(
                    f"weight is {weight_B.dtype} {tuple(weight_B.shape)}; expected float32 [{num}]", field="weight"
                )
            weight_B = native.contiguous(weight_B)
        index, error_B = native.contiguous(index_B), torch.empty(num)
        self._struct.is_double = is_double
        weights = None if weight_B is None else weight_B.data_ptr()
        out = error_B.data_ptr()
        bad = self._function(self._address, index.data_ptr(), weights, num, out, self._stats_address)
        if bad != -1:
            self._refuse(rows, index, bad)
        for p, grad in zip(self._params, self._grads):  # noqa: B905  (made as long as each other)
            if p.grad is not grad:
                p.grad = grad
        return error_B, self._stats[0], self._stats[1]

    def _refuse(self, rows: TransitionRows, index: Tensor, bad: int) -> None:
        if bad < -1:
            raise InputError(
                f"index[{-2 - bad}] is {int(index[-2 - bad])}; expected 0 <= index < {self._struct.num_rows}",
                field="index",
            )
        raise InputError(
            f"action of row {int(index[bad])} is {int(rows.action[index[bad]])}; "
            f"expected 0 <= action < {self._chains[0].sizes[-1]}",
            field="action",
        )


def _check(rows: TransitionRows, num_features: int) -> None:
    num = rows.features.shape[0]
    expected = (
        ("features", rows.features, torch.float32, (num, num_features)),
        ("next_features", rows.next_features, torch.float32, (num, num_features)),
        ("action", rows.action, torch.int64, (num,)),
        ("reward", rows.reward, torch.float32, (num,)),
        ("discount", rows.discount, torch.float32, (num,)),
    )
    for name, tensor, dtype, shape in expected:
        if not (tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous()):
            raise InputError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}; "
                f"expected contiguous {dtype} {shape} on the CPU",
                field=name,
            )
