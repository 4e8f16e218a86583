"""What flows through a CNTK graph: tensors with dynamic axes in front.

Legend: B sequences or rows of a batch, T time steps, S static dimensions (row-major, the reverse of CNTK's order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.core.errors import InputError


@dataclass(frozen=True)
class Value:
    """A tensor [*S] (`num_dynamic` 0), [B, *S] (1) or [B, T, *S] (2).

    `lengths` [B] counts the real steps of each row, which come first; None where all T are real. `num_classes` > 0 marks
    `tensor` [B] or [B, T] as indices that stand for one-hot vectors [num_classes].
    """

    tensor: Tensor
    num_dynamic: int
    lengths: Tensor | None = None
    num_classes: int = 0

    @property
    def static(self) -> tuple[int, ...]:
        """The static dimensions S."""
        return (self.num_classes,) if self.num_classes else tuple(self.tensor.shape[self.num_dynamic :])

    def dense(self) -> Value:
        """The same with one-hot vectors and sparse rows written out."""
        if self.num_classes:
            hot = F.one_hot(self.tensor.long(), self.num_classes).to(torch.get_default_dtype())
            return replace(self, tensor=hot, num_classes=0)
        if self.tensor.layout != torch.strided:
            return replace(self, tensor=self.tensor.to_dense())
        return self

    def mask(self) -> Tensor | None:
        """[B, T], true at real steps; None where all are."""
        if self.lengths is None or self.num_dynamic != 2:
            return None
        return torch.arange(self.tensor.shape[1], device=self.tensor.device) < self.lengths[:, None]


def align(values: Sequence[Value]) -> tuple[list[Tensor], int, Tensor | None]:
    """Tensors whose static dimensions line up at the back and dynamic ones at the front, with the dynamic axes of all.

    >>> rows = Value(torch.zeros(2, 5), 1)
    >>> [tuple(x.shape) for x in align([rows, Value(torch.zeros(3, 5), 0)])[0]]
    [(2, 1, 5), (1, 3, 5)]
    """
    values = [value.dense() for value in values]
    num_dynamic = max(value.num_dynamic for value in values)
    num_static = max(len(value.static) for value in values)
    lengths = next((value.lengths for value in values if value.lengths is not None), None)
    tensors = []
    for value in values:
        shape = tuple(value.tensor.shape)
        front, back = shape[: value.num_dynamic], shape[value.num_dynamic :]
        front += (1,) * (num_dynamic - len(front)) if front else (1,) * num_dynamic
        tensors.append(value.tensor.reshape(*front, *(1,) * (num_static - len(back)), *back))
    return tensors, num_dynamic, lengths


def from_sequences(sequences: Sequence[Tensor], num_classes: int = 0) -> Value:
    """Ragged sequences [T_i, *S] as one padded value with lengths.

    Raises:
        InputError: there are none, one is empty, or their static dimensions differ.
    """
    if not sequences or any(len(sequence) == 0 for sequence in sequences):
        raise InputError("a batch holds at least one sequence, each of at least one step", field="inputs")
    if len({tuple(sequence.shape[1:]) for sequence in sequences}) != 1:
        raise InputError(f"sequences of shapes {[tuple(s.shape) for s in sequences]}", field="inputs")
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=sequences[0].device)
    if sequences[0].layout != torch.strided:
        padded = _pad_sparse(sequences, int(lengths.max()))
    else:
        padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    same = len({len(sequence) for sequence in sequences}) == 1
    return Value(padded, 2, None if same else lengths, num_classes)


def _pad_sparse(sequences: Sequence[Tensor], num_steps: int) -> Tensor:
    """Sparse sequences [T_i, V] as one sparse [B, T, V]."""
    parts = [sequence.coalesce() for sequence in sequences]
    indices = [F.pad(part.indices(), (0, 0, 1, 0), value=row) for row, part in enumerate(parts)]
    size = (len(parts), num_steps, parts[0].shape[1])
    return torch.sparse_coo_tensor(
        torch.cat(indices, 1), torch.cat([part.values() for part in parts]), size, check_invariants=True
    )


def to_sequences(value: Value) -> list[Tensor]:
    """The inverse of `from_sequences`."""
    value = value.dense()
    if value.lengths is None:
        return list(value.tensor)
    return [row[:length] for row, length in zip(value.tensor, value.lengths.tolist(), strict=True)]
