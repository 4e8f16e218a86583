"""Dense chain through the compiled kernels: what C needs to know about a parameter list is built once and kept while
the parameters stay where they are.

Legend: M rows, K in, N out, E ensemble members.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native

ACTIVATION_CODES = {"none": 0, "tanh": 1, "relu": 2, "elu": 3, "silu": 4, "gelu": 5, "sigmoid": 6}
DTYPE_CODES = {"fp32": 0, "bf16": 1}
_NEEDS_PREACTIVATION = ("silu", "gelu")
_MAX_LAYERS = 64


class _MlpStruct(ctypes.Structure):
    """`LsMlp` of csrc/lockstep.h."""

    _fields_ = (
        ("num_layers", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("output_activation", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("num_members", ctypes.c_int64),
        ("sizes", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
    )


class Chain:
    """The C description of one parameter list. `address` is what the kernels take."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        activation: str,
        output_activation: str,
        dtype: str,
    ) -> None:
        self.members, self.sizes = _check(weights, biases)
        self.num_layers = len(weights)
        self.shapes = [None if t is None else t.shape for t in (*weights, *biases)]
        self.refs = [None if t is None else weakref.ref(t) for t in (*weights, *biases)]
        self.addresses = [0 if t is None else t.data_ptr() for t in (*weights, *biases)]
        self._sizes = (ctypes.c_int64 * len(self.sizes))(*self.sizes)
        self._weights = native.address_array([w.data_ptr() for w in weights])
        self._biases = native.address_array([None if b is None else b.data_ptr() for b in biases])
        self._struct = _MlpStruct(
            self.num_layers,
            ACTIVATION_CODES[activation],
            ACTIVATION_CODES[output_activation],
            DTYPE_CODES[dtype],
            self.members,
            ctypes.addressof(self._sizes),
            ctypes.addressof(self._weights),
            ctypes.addressof(self._biases),
        )
        self.address = ctypes.addressof(self._struct)
        widths = list(self.sizes[1:-1])
        widths += widths if activation in _NEEDS_PREACTIVATION else []
        widths += [self.sizes[-1]] if output_activation in _NEEDS_PREACTIVATION else []
        self.on_death: weakref.ref[Tensor] | None = None
        self.saved_per_row = max(1, self.members) * sum(widths)

    def holds(self, params: Sequence[Tensor | None]) -> bool:
        """True while every parameter is the same object at the same address."""
        if len(params) != len(self.refs):
            return False
        for param, ref, address in zip(params, self.refs, self.addresses):  # noqa: B905  (lengths were compared)
            if param is None or ref is None:
                if param is not None or ref is not None:
                    return False
            elif ref() is not param or param.data_ptr() != address:
                return False
        return True


def _check(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[int, tuple[int, ...]]:
    """(ensemble members or 0, layer widths) of a parameter list that fits together."""
    if not 0 < len(weights) <= _MAX_LAYERS:
        raise InputError(f"mlp takes 1 to {_MAX_LAYERS} layers; got {len(weights)}", field="weights")
    lead = tuple(weights[0].shape[:-2])
    if len(lead) > 1:
        raise InputError(f"weights are [K, N] or [E, K, N]; got {tuple(weights[0].shape)}", field="weights")
    sizes = [weights[0].shape[-2]]
    for index, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if tuple(w.shape) != (*lead, sizes[-1], w.shape[-1]):
            raise InputError(
                f"weights[{index}] is {tuple(w.shape)}; expected {(*lead, sizes[-1], 'N')}: the output of the layer "
                "before is its input",
                field="weights",
            )
        if b is not None and tuple(b.shape) != (*lead, w.shape[-1]):
            raise InputError(f"biases[{index}] is {tuple(b.shape)}; expected {(*lead, w.shape[-1])}", field="biases")
        for name, tensor in (("weights", w), ("biases", b)):
            if tensor is not None and not (tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous()):
                raise InputError(
                    f"{name}[{index}] must be a contiguous float32 tensor on the CPU; got {tensor.dtype} on "
                    f"{tensor.device} with strides {tensor.stride()}",
                    field=name,
                )
        sizes.append(w.shape[-1])
    return (lead[0] if lead else 0), tuple(sizes)


_chains: dict[tuple[int, str, str, str], Chain] = {}


def chain_of(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str,
    output_activation: str,
    dtype: str,
) -> Chain:
    """The description of this list, from the cache while it still holds."""
    key = (id(weights[0]), activation, output_activation, dtype)
    params = (*weights, *biases)
    chain = _chains.get(key)
    if chain is not None and chain.holds(params):
        return chain
    chain = Chain(weights, biases, activation, output_activation, dtype)
    _chains[key] = chain
    # Parameters that live for one call (noisy layers make them) take their entry along when they go.
    chain.on_death = weakref.ref(weights[0], lambda _: _chains.pop(key, None))
    return chain


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str,
    output_activation: str,
    dtype: str,
) -> Tensor:
    """See `lockstep.kernels.mlp`."""
    chain = chain_of(weights, biases, activation, output_activation, dtype)
    shape = x.shape
    if shape[-1] != chain.sizes[0]:
        raise InputError(f"x has {shape[-1]} features; the first layer takes {chain.sizes[0]}", field="x")
    num_dims = len(shape)
    flat = num_dims != 2 and not (chain.members and num_dims == 3)
    if flat:
        if chain.members:
            raise InputError(f"x of an ensemble is [M, K] or [E, M, K]; got {tuple(shape)}", field="x")
        x = x.reshape(-1, shape[-1])
    elif num_dims == 3 and shape[0] != chain.members:
        raise InputError(f"x has {shape[0]} members; the ensemble has {chain.members}", field="x")
    if not x.is_contiguous():
        x = x.contiguous()
    if torch.is_grad_enabled() and (
        x.requires_grad or any(p is not None and p.requires_grad for p in (*weights, *biases))
    ):
        y = _Mlp.apply(x, chain, *weights, *biases)  # type: ignore[no-untyped-call]
    else:
        y = _forward(chain, x, None)
    return y.view(*shape[:-1], chain.sizes[-1]) if flat else y  # type: ignore[no-any-return]


def _forward(chain: Chain, x: Tensor, saved: int | None) -> Tensor:
    num_rows = x.shape[-2]
    width = chain.sizes[-1]
    y = torch.empty((chain.members, num_rows, width) if chain.members else (num_rows, width), dtype=torch.float32)
    native.lib().ls_mlp_forward(chain.address, x.data_ptr(), y.data_ptr(), saved, num_rows, x.dim() == 3)
    return y


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Chain, *params: Tensor | None) -> Tensor:
        saved = torch.empty(chain.saved_per_row * x.shape[-2], dtype=torch.float32)
        y = _forward(chain, x, saved.data_ptr())
        ctx.chain = chain
        ctx.save_for_backward(x, y, saved, *params)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        native.refuse_double_backward()
        chain = ctx.chain
        x, y, saved, *params = ctx.saved_tensors
        dy = native.contiguous(grads[0])
        needs = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs[0] else None
        dparams: list[Tensor | None] = [None] * len(params)
        dweights = dbiases = None
        if any(needs[2:]):
            if x.shape[-2] == 0:
                dparams = [None if p is None else torch.zeros_like(p) for p in params]
            else:
                dparams = [None if p is None else torch.empty_like(p) for p in params]
            addresses = [None if d is None else d.data_ptr() for d in dparams]
            dweights = native.address_array(addresses[: chain.num_layers])
            dbiases = native.address_array(addresses[chain.num_layers :])
        native.lib().ls_mlp_backward(
            chain.address,
            x.data_ptr(),
            y.data_ptr(),
            saved.data_ptr(),
            dy.data_ptr(),
            None if dx is None else dx.data_ptr(),
            dweights,
            dbiases,
            x.shape[-2],
            x.dim() == 3,
        )
        wanted = (d if need else None for d, need in zip(dparams, needs[2:], strict=True))
        return (dx, None, *wanted)
