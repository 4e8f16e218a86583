"""The C description of an act.

Legend: M rows, D observation features.
"""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

from lockstep.kernels import native
from lockstep.kernels.mlp.cpu import Chain
from lockstep.kernels.plan.spec import HEADS, Head, Net, Normaliser


class _PlanStruct(ctypes.Structure):
    """`LsPlan` of csrc/lockstep.h."""

    _fields_ = (
        ("actor", ctypes.c_void_p),
        ("critic", ctypes.c_void_p),
        ("norm_mean", ctypes.c_void_p),
        ("norm_inv_std", ctypes.c_void_p),
        ("log_std", ctypes.c_void_p),
        ("block_sizes", ctypes.c_void_p),
        ("features", ctypes.c_void_p),
        ("head_input", ctypes.c_void_p),
        ("actions", ctypes.c_void_p),
        ("choices", ctypes.c_void_p),
        ("logprob", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("head", ctypes.c_int32),
        ("norm_clip", ctypes.c_float),
        ("log_std_min", ctypes.c_float),
        ("log_std_max", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("reserved", ctypes.c_int32),
        ("num_rows", ctypes.c_int64),
        ("num_obs", ctypes.c_int64),
        ("num_actions", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
    )


class Compiled:
    """An act bound to the present addresses of its tensors and to fixed output arrays."""

    def __init__(
        self,
        actor: Net,
        head: Head,
        critic: Net | None,
        normaliser: Normaliser | None,
        arrays: dict[str, np.ndarray],
        sizes: tuple[int, ...],
    ) -> None:
        self._actor = _chain(actor)
        self._critic = None if critic is None else _chain(critic)
        self._blocks = (ctypes.c_int64 * len(sizes))(*sizes)
        num_rows, num_obs = arrays["features"].shape
        width = arrays["head_input"].shape[1]
        self.struct = _PlanStruct(
            actor=self._actor.address,
            critic=None if self._critic is None else self._critic.address,
            norm_mean=None if normaliser is None else normaliser.mean.data_ptr(),
            norm_inv_std=None if normaliser is None else normaliser.inv_std.data_ptr(),
            log_std=None if head.log_std is None else head.log_std.data_ptr(),
            block_sizes=ctypes.addressof(self._blocks),
            head=HEADS.index(head.kind),
            norm_clip=0.0 if normaliser is None else normaliser.clip,
            log_std_min=head.log_std_min,
            log_std_max=head.log_std_max,
            epsilon=head.epsilon,
            num_rows=num_rows,
            num_obs=num_obs,
            num_actions=width // 2 if head.kind == "squashed" else width,
            num_blocks=len(sizes),
            **{name: array.ctypes.data for name, array in arrays.items()},
        )
        self.address = ctypes.addressof(self.struct)
        # A short call keeps the interpreter lock: giving it up could cost a switch interval of another thread.
        short = num_rows <= 32
        library = native.state.library_holding_gil if short else native.state.library
        assert library is not None
        self.function = library.ls_plan_run


def _chain(net: Net) -> Chain:
    return Chain(net.weights, net.biases, net.activation, net.output_activation, net.dtype)


def tensors_of(actor: Net, head: Head, critic: Net | None, normaliser: Normaliser | None) -> list[Tensor]:
    """Every tensor whose address the C description holds."""
    found: list[Tensor | None] = [head.log_std]
    for net in (actor, critic):
        if net is not None:
            found += [*net.weights, *net.biases]
    if normaliser is not None:
        found += [normaliser.mean, normaliser.inv_std]
    return [t for t in found if t is not None]
