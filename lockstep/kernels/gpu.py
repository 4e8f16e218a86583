"""What the Triton versions of the ops share: the module when it is first needed, and gradients by the reference.

Every kernel gives a row (or a tile of a fixed number of rows) to one program, which walks its inputs in one order: no
split of a sum depends on how many rows there are. Written for NVIDIA and AMD GPUs; so far only Triton's interpreter has run
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lockstep.core.extras import require


class Later:
    """A module that is imported when a name of it is first asked for: Triton is optional and slow to import."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: ModuleType | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what inspection asks of any object
            raise AttributeError(name)
        if self._module is None:
            require("triton", extra="gpu")
            self._module = import_module(self._name)
        return vars(self._module)[name]


class _ByReference(torch.autograd.Function):
    """Forward: the kernel. Backward: the gradient of the reference at the same inputs, computed anew."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], reference: Callable[..., Any], *tensors: Tensor | None) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.reference = reference
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            inputs = [
                None if tensor is None else tensor.detach().requires_grad_(want)
                for tensor, want in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            outputs = ctx.reference(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sources = [x for x, want in zip(inputs, wanted, strict=True) if want and x is not None]
        found = iter(torch.autograd.grad(outputs, sources, grads))
        return None, None, *(next(found) if want else None for want in wanted)


def differentiable(run: Callable[..., Any], reference: Callable[..., Any], tensors: Sequence[Tensor | None]) -> Any:
    """run(*tensors), with the reference's gradient where one is wanted."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _ByReference.apply(run, reference, *tensors)  # type: ignore[no-untyped-call]
    return run(*tensors)
