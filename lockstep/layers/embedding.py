"""Token and position embeddings: rows looked up in a float, bf16 or quantised table.

Legend: T packed tokens, V vocabulary, E model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lockstep.core.errors import InputError
from lockstep.kernels.packed_linear import PackedWeight, unpack_some
from lockstep.layers.projection import Matrix, Precision, pack_parts, plain


class Embedding(nn.Module):
    """Rows of a [V, E] table as float32, times `scale`.

    With a master the table is a Parameter and a row is rounded to bf16 where the products are bf16, so that the learner
    reads what an engine with a bf16 copy reads. Without one the table lies in bf16 or float32, or packed: quantised as the
    file had it, or shared with the output matrix.
    """

    def __init__(self, num_rows: int, size: int, precision: Precision, *, scale: float = 1.0) -> None:
        super().__init__()
        self.num_rows, self.size, self.scale = num_rows, size, scale
        self.precision = precision
        self.weight: nn.Parameter | None
        if precision.master is None:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(num_rows, size, dtype=precision.master))
        self._table: Tensor | PackedWeight | None = None

    def forward(self, tokens_T: Tensor) -> Tensor:
        """tokens [T] int64 -> [T, E] float32."""
        rows_TE = self._rows(tokens_T)
        return rows_TE if self.scale == 1.0 else rows_TE * self.scale

    def _rows(self, tokens_T: Tensor) -> Tensor:
        if self.weight is not None:
            rows_TE = nn.functional.embedding(tokens_T, self.weight)
            if self.precision.compute != "fp32":
                rows_TE = rows_TE.to(torch.bfloat16)
            return rows_TE.to(torch.float32)
        table = self._table
        if table is None:
            raise InputError("the embedding holds no weights yet; load or initialise the model first", field="weight")
        if isinstance(table, PackedWeight):
            return unpack_some(table, tokens_T)
        return table.index_select(0, tokens_T).to(torch.float32)

    @torch.no_grad()
    def fill(self, table_VE: Matrix) -> None:
        """Take the table; a quantised one stays as it is where nothing is trained."""
        if self.weight is not None:
            self.weight.copy_(plain(table_VE))
        elif isinstance(table_VE, Tensor):
            self._table = table_VE.to(torch.float32 if self.precision.compute == "fp32" else torch.bfloat16)
        else:
            (self._table,) = pack_parts([table_VE], self.precision)

    def share(self, packed: PackedWeight) -> None:
        """Read the rows of a packed matrix that holds the same numbers, and give up the table's own memory."""
        assert self.weight is None
        self._table = packed

    @torch.no_grad()
    def fill_random(self, generator: torch.Generator, std: float) -> None:
        """Normal entries of standard deviation `std`."""
        if self.weight is not None:
            self.weight.normal_(0.0, std, generator=generator)
            return
        dtype = torch.float32 if self.precision.compute == "fp32" else torch.bfloat16
        self._table = torch.empty(self.num_rows, self.size, dtype=dtype).normal_(0.0, std, generator=generator)

    def table(self) -> Tensor | PackedWeight:
        """The whole table [V, E] as it is stored."""
        if self.weight is not None:
            return self.weight.detach()
        if self._table is None:
            raise InputError("the embedding holds no weights yet", field="weight")
        return self._table

    def extra_repr(self) -> str:
        return f"{self.num_rows} x {self.size}, {self.precision.compute}"


def embedding_scale(width: int, precision: Precision) -> float:
    """Gemma's factor on embeddings, the root of the width; in bf16 it is the rounded number the models were trained with."""
    scale = torch.tensor(width**0.5)
    return float(scale if precision.compute == "fp32" else scale.to(torch.bfloat16))
