"""What flows along the edges of a graph: tensors, and small arrays that stay outside of tensors.

A shape computed by a graph (`Shape`, `Gather`, `Concat`, ... , `Reshape`) is a `Host`: Python integers, symbolic ones while
`torch.export` traces. Were it a tensor, every dynamic size would end a compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

HOST_SIZE = 256
"""Longest array that is kept outside of tensors."""


class Host:
    """A number (rank 0) or list of numbers (rank 1) of a given dtype.

    >>> Host([2, 3], torch.int64).tensor()
    tensor([2, 3])
    """

    __slots__ = ("data", "dtype", "stored")

    def __init__(self, data: Any, dtype: torch.dtype, stored: torch.Tensor | None = None) -> None:
        self.data = data
        self.dtype = dtype
        self.stored = stored

    @property
    def rank(self) -> int:
        """0 or 1."""
        return 1 if isinstance(self.data, list) else 0

    def items(self) -> list[Any]:
        """The numbers, one for rank 0."""
        return self.data if isinstance(self.data, list) else [self.data]

    def tensor(self, device: torch.device | None = None) -> torch.Tensor:
        """As a tensor."""
        if self.stored is not None:
            return self.stored
        if isinstance(self.data, list) and any(isinstance(x, torch.SymInt) for x in self.data):
            return torch.stack([torch.scalar_tensor(x, dtype=self.dtype, device=device) for x in self.data])
        return torch.tensor(self.data, dtype=self.dtype, device=device)

    def __repr__(self) -> str:
        return f"Host({self.data}, {self.dtype})"


class Items(list[Any]):
    """A value of ONNX's sequence type."""


Value = Any
"""Tensor | Host | Items | None (an input left out, an empty optional) | numpy array of str."""


def to_tensor(value: Value, device: torch.device | None = None) -> Any:
    """Host -> tensor; everything else as it is."""
    return value.tensor(device) if isinstance(value, Host) else value


def to_tensors(values: Sequence[Value]) -> list[Any]:
    """Hosts become tensors on the device of the first tensor."""
    device = None
    for value in values:
        if isinstance(value, torch.Tensor):
            device = value.device
            break
    return [value.tensor(device) if isinstance(value, Host) else value for value in values]


def to_ints(value: Value) -> list[int]:
    """Python integers of a Host or tensor of rank 0 or 1.

    A tensor's are read from the device, which ends a compiled graph.
    """
    if isinstance(value, Host):
        return list(value.items())
    return [int(x) for x in value.reshape(-1).tolist()]


def to_scalar(value: Value) -> Any:
    """The one number of a Host or tensor."""
    if isinstance(value, Host):
        (item,) = value.items()
        return item
    return value.reshape(()).item()


def host_value(tensor: torch.Tensor) -> Any:
    """The numbers of a stored tensor that is small enough to be a Host, else None."""
    if tensor.ndim > 1 or tensor.numel() > HOST_SIZE or tensor.dtype not in HOST_DTYPES:
        return None
    return tensor.tolist()


HOST_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
)
