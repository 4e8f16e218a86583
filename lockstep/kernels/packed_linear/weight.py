"""A matrix in the order in which the kernel reads it.

Legend: N outputs, K inputs, X experts, B groups of a row, P panels.

fp32 and bf16: panels of 64 outputs, [P, K, 64] floats or [P, ceil(K/2), 64, 2] bfloat16: what one input (or a pair)
contributes to 64 outputs is contiguous. Quantised: panels of 32 outputs, [P, B, unit bytes]; a unit is the codes of one
group, then its 32 scales, then its 32 minima if there are any. 8-bit codes are stored as code + 128 in the order
[group/4, 32, 4]; 4-bit codes as nibbles in the order [group/8, 32, 4], inputs 8 s + t low and 8 s + 4 + t high. So every
matrix is one stream of bytes from its first panel to its last. Absent outputs (N not a multiple) are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

FORMATS = ("fp32", "bf16", "int8", "int4")
GROUPS = (16, 32, 64, 128)
ROW_BLOCK = 32
"""Inputs of a row that share a scale when the row is rounded to int8."""

KIND_FP32, KIND_BF16, KIND_BYTES, KIND_NIBBLES, KIND_TABLE = range(5)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """A [N, K] matrix, or X of them, ready for `packed_linear`; make one with `pack`, `pack_planes` or `stack`."""

    format: str
    """One of FORMATS."""
    num_outputs: int
    num_inputs: int
    num_experts: int | None = None
    """X of a stack; None for a single matrix."""
    group: int = 0
    """Inputs that share a scale; 0 for fp32 and bf16."""
    scale_bytes: int = 0
    """2 where all scales are fp16 numbers, else 4."""
    minimum_bytes: int = 0
    """0 without minima."""
    offset: int = 0
    """A stored code is code + offset, or the place in `table`."""
    table: tuple[int, ...] | None = None
    data: Tensor
    """uint8, one dimension; see the module's text."""
    spec: Tensor = field(init=False, repr=False)
    """int64 [10]: LsPackedSpec of csrc/packed.h; always on the CPU."""

    def __post_init__(self) -> None:
        table = bytes((value + 128) & 0xFF for value in self.table or ()).ljust(16, b"\0")
        numbers = [
            *(self.kind, self.num_outputs, self.num_inputs, self.group, self.scale_bytes, self.minimum_bytes),
            *(128 if self.kind == KIND_TABLE else self.offset, self.expert_bytes),
        ]
        numbers += [int.from_bytes(table[:8], "little", signed=True), int.from_bytes(table[8:], "little", signed=True)]
        object.__setattr__(self, "spec", torch.tensor(numbers, dtype=torch.int64))

    @property
    def kind(self) -> int:
        """Which tile reads it; the order is that of LsPackedKind."""
        if self.format == "fp32":
            return KIND_FP32
        if self.format == "bf16":
            return KIND_BF16
        if self.format == "int8":
            return KIND_BYTES
        return KIND_TABLE if self.table is not None else KIND_NIBBLES

    @property
    def quantised(self) -> bool:
        return self.group > 0

    @property
    def panel(self) -> int:
        """Outputs of a panel."""
        return 32 if self.quantised else 64

    @property
    def num_panels(self) -> int:
        return -(-self.num_outputs // self.panel)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a group of a panel."""
        return self.group * self.panel // (2 if self.format == "int4" else 1)

    @property
    def unit_bytes(self) -> int:
        """Bytes of a group of a panel with its scales and minima."""
        return self.code_bytes + self.panel * (self.scale_bytes + self.minimum_bytes)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one matrix."""
        if self.quantised:
            return self.num_panels * (self.num_inputs // self.group) * self.unit_bytes
        pairs = -(-self.num_inputs // 2)
        return self.num_panels * 64 * 4 * (self.num_inputs if self.format == "fp32" else pairs)

    @property
    def bytes_per_weight(self) -> float:
        """What one weight takes in memory, scales, minima and padding included."""
        return self.expert_bytes / (self.num_outputs * self.num_inputs)

    def expert(self, index: int) -> PackedWeight:
        """One matrix of a stack, without a copy."""
        size = self.expert_bytes
        return self.like(self.data[index * size : (index + 1) * size], num_experts=None)

    def like(self, data: Tensor, num_experts: int | None) -> PackedWeight:
        """The same layout over other bytes."""
        return replace(self, data=data, num_experts=num_experts)

    def same_layout(self, other: PackedWeight) -> bool:
        """True if the two differ in their numbers only."""
        return bool(torch.equal(self.spec, other.spec))
