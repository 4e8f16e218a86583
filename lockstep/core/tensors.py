"""Named weights, wherever they lie: what a model family asks for when it loads, and what every file format answers.

A family's `weights.py` reads a `TensorSource` by Hugging Face names only; whether the bytes come from safetensors or from
quantised GGUF blocks is the source's business.

Letters: N rows (outputs of a linear), K columns (its inputs), G = K / group.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class QuantPlanes:
    """A block-quantised matrix taken apart, elements in natural order.

    The value of element (n, k), with g = k // group, every operation rounded to float32 on its own, is

        scales[n, g] * (codes[n, k] or table[codes[n, k]]) + minimums[n, g]        (no addition if `minimums` is None)

    Signs: `codes` are the signed integers to multiply with (offsets already subtracted); `minimums` is added, so for the
    formats that store a value to subtract it is the negated one.

    >>> import numpy as np
    >>> planes = QuantPlanes(np.array([[-8, 7]], np.int8), np.array([[0.5]], np.float32), None, 2, 4, -8, None)
    >>> planes.dequantise().tolist()
    [[-4.0, 3.5]]
    """

    codes: NDArray[np.int8]
    """[N, K]; each code lies in [low, low + 2**bits)."""
    scales: NDArray[np.float32]
    """[N, G]."""
    minimums: NDArray[np.float32] | None
    """[N, G] or None."""
    group: int
    """Elements that share a scale: 16 or 32."""
    bits: int
    """Bits that a code needs."""
    low: int
    """Smallest code the format can hold."""
    table: NDArray[np.int8] | None
    """[16] values that the codes stand for, or None if a code is its own value."""

    def dequantise(self) -> NDArray[np.float32]:
        """The matrix, float32 [N, K]."""
        num_rows, num_columns = self.codes.shape
        values = self.codes if self.table is None else self.table[self.codes]
        grouped = values.astype(np.float32).reshape(num_rows, num_columns // self.group, self.group)
        # Infinite or NaN scales are the file's; they come out as the format says.
        with np.errstate(all="ignore"):
            grouped *= self.scales[:, :, None]
            if self.minimums is not None:
                grouped += self.minimums[:, :, None]
        return grouped.reshape(num_rows, num_columns)


class QuantisedTensor(Protocol):
    """A matrix as it lies in the file, in quantised blocks along its columns."""

    @property
    def kind(self) -> str:
        """Name of the block format, such as "Q4_0"."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) in elements."""
        ...

    @property
    def data(self) -> NDArray[np.uint8]:
        """[N, bytes of a row], rows in the order of the Hugging Face tensor."""
        ...

    def planes(self, start: int = 0, stop: int | None = None) -> QuantPlanes:
        """Rows [start, stop) taken apart."""
        ...

    def dequantise(self) -> NDArray[np.float32]:
        """float32 [N, K]."""
        ...


class TensorSource(Protocol):
    """A readable model: config, tensors by Hugging Face name, tokenizer. Nothing is read before it is asked for.

    Unknown names raise `InputError`, unreadable bytes `FormatError`; both name the file and the tensor.
    """

    def config(self) -> dict[str, Any]:
        """The model's config as a Hugging Face `config.json` would hold it."""
        ...

    def generation_config(self) -> dict[str, Any]:
        """Sampling defaults and special ids as `generation_config.json` would hold them; empty if there are none."""
        ...

    def names(self) -> list[str]:
        """Every tensor, by its Hugging Face name, in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor that `tensor(name)` returns, from the header alone."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, memory-mapped where the layout allows; quantised ones come as float32."""
        ...

    def quantised(self, name: str) -> QuantisedTensor | None:
        """The blocks of a quantised matrix, rows = outputs; None if the tensor is stored as plain numbers."""
        ...

    def tokenizer(self) -> Path | dict[str, Any]:
        """A folder with tokenizer files, or the tokenizer's metadata by GGUF key."""
        ...
