"""Optimiser arithmetic through the compiled kernels: all tensors of a network in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lockstep.kernels import native


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(tensors))(*[t.numel() for t in tensors])


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(Tensor.data_ptr, tensors))


class Addresses:
    """Where parameters and moments lie; built again only when a parameter has moved."""

    def __init__(self, params: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor]) -> None:
        self.params = params
        self.fits = all(p.is_contiguous() and p.is_cpu and p.dtype is torch.float32 for p in params)
        self._current = [*map(Tensor.data_ptr, params)]
        self._params, self._sizes = _addresses(params), _sizes(params)
        self._moments = _addresses(exp_avgs), _addresses(exp_avg_sqs)
        # Gradients that are written in place step after step keep their addresses.
        self._grads_at: list[int | None] = []
        self._grads = native.address_array([])

    def hold(self) -> bool:
        """True while every parameter is where it was."""
        return self._current == [*map(Tensor.data_ptr, self.params)]

    def step(
        self,
        grads: Sequence[Tensor | None],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        count: int,
        max_grad_norm: float | None,
    ) -> float:
        """One Adam step in place; returns the gradient norm before clipping."""
        kept = [None if g is None else native.contiguous(g) for g in grads]
        at = [None if g is None else g.data_ptr() for g in kept]
        if at != self._grads_at:
            self._grads_at, self._grads = at, native.address_array(at)
        norm = native.lib().ls_adam(
            self._params,
            self._grads,
            *self._moments,
            self._sizes,
            len(self.params),
            lr,
            *betas,
            eps,
            weight_decay,
            count,
            -1.0 if max_grad_norm is None else max_grad_norm,
        )
        # The kernel writes behind autograd's back; a graph that saved a parameter must still notice.
        torch.autograd.graph.increment_version(self.params)
        return float(norm)


def polyak(targets: Sequence[Tensor], sources: Sequence[Tensor], tau: float) -> None:
    """target += tau * (source - target), in place."""
    native.lib().ls_polyak(_addresses(targets), _addresses(sources), _sizes(targets), len(targets), tau)
    torch.autograd.graph.increment_version(targets)
