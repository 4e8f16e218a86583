"""Examples side by side in one forward pass, without padding.

Legend: L tokens of an example, T packed tokens, S sequences of a micro-batch, R rows whose next token has a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One token sequence to learn from.

    >>> example = Example.of([5, 6, 7], weight=[0, 0, 1], columns={"advantage": [0, 0, 0.5]})
    >>> example.num_weighted
    1
    """

    tokens: Tensor
    """int64 [L]."""
    weight: Tensor
    """float32 [L]: weight[t] multiplies the loss of predicting tokens[t] from tokens[:t]; 0 leaves it out, and weight[0] is
    0, because nothing precedes the first token."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Numbers beside each token, float32 [L], such as "advantage" or "old_logprob"; read where the weight is not 0."""

    def __post_init__(self) -> None:
        length = len(self.tokens)
        if self.tokens.dtype is not torch.int64 or self.tokens.dim() != 1 or length == 0:
            raise InputError(
                f"tokens are {self.tokens.dtype} {list(self.tokens.shape)}; expected int64 [L], L at least 1",
                field="tokens",
            )
        for name, column in {"weight": self.weight, **self.columns}.items():
            if column.dtype is not torch.float32 or column.shape != (length,):
                raise InputError(
                    f"{name} is {column.dtype} {list(column.shape)}; expected float32 [{length}], one number a token",
                    field=name,
                )
        if float(self.weight[0]) != 0.0:
            raise InputError(
                f"weight[0] is {float(self.weight[0])}; expected 0: nothing predicts the first token", field="weight"
            )
        used = self.weight != 0
        for name, column in {"weight": self.weight, **self.columns}.items():
            if not bool(torch.isfinite(column[used]).all()):
                raise InputError(f"{name} holds numbers that are not finite where it is read", field=name)

    @staticmethod
    def of(
        tokens: Sequence[int], *, weight: Sequence[float], columns: Mapping[str, Sequence[float]] | None = None
    ) -> Example:
        """From lists."""
        return Example(
            tokens=torch.tensor(list(tokens), dtype=torch.int64),
            weight=torch.tensor(list(weight), dtype=torch.float32),
            columns={k: torch.tensor(list(v), dtype=torch.float32) for k, v in (columns or {}).items()},
        )

    @property
    def num_weighted(self) -> int:
        """Tokens that the loss is over."""
        return int((self.weight != 0).sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """Whole examples for one forward and backward pass. Sequences are never cut, so a sequence's sums are sums over the
    rows of one micro-batch."""

    batch: ForwardBatch
    rows_R: Tensor
    """int64: row rows_R[r] of the batch's T predicts targets_R[r]; rising within a sequence. Sequences may share rows."""
    targets_R: Tensor
    """int64."""
    weight_R: Tensor
    """float32, never 0."""
    columns: Mapping[str, Tensor]
    """float32 [R] each."""
    sequence_R: Tensor
    """int64: which of the S sequences; rising."""
    positions_R: Tensor
    """int64: place of the target in its sequence's tokens."""
    examples: tuple[int, ...]
    """Of each sequence, its place in the list handed to `micro_batches`."""

    @property
    def num_tokens(self) -> int:
        """Rows that are computed: those of a shared prefix once, none from a sequence's last target on."""
        return self.batch.num_tokens

    @property
    def num_sequences(self) -> int:
        return len(self.examples)

    @property
    def num_rows(self) -> int:
        return int(self.rows_R.shape[0])

    def with_columns(self, **columns: Tensor) -> MicroBatch:
        """The same rows with more numbers beside them."""
        return replace(self, columns={**self.columns, **columns})

    def sequence_sum(self, values_R: Tensor) -> Tensor:
        """Sum over the rows of each sequence: [R] -> [S]."""
        return values_R.new_zeros(self.num_sequences).index_add(0, self.sequence_R, values_R)

    def sequence_rows(self) -> Tensor:
        """Rows of each sequence, float32 [S]; 0 where no token has a weight."""
        return torch.bincount(self.sequence_R, minlength=self.num_sequences).to(torch.float32)


def micro_batches(
    examples: Sequence[Example], max_tokens: int, *, together: int = 1, device: torch.device | str = "cpu"
) -> list[MicroBatch]:
    """Put the examples into as few micro-batches of at most `max_tokens` tokens as first fit by falling length finds.

    Deterministic: a function of the lengths and of the order of the list.

    Args:
        together: so many neighbours in the list, such as a chosen and a rejected answer, stay neighbours in a micro-batch.

    Raises:
        InputError: an example (or `together` of them) is longer than `max_tokens`; examples with different columns; a
            number of examples that `together` does not divide.
        ConfigError: max_tokens below 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens}; expected 1 or more")
    lengths = [len(example.tokens) for example in examples]
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise InputError(
                f"example {index} has {length} tokens, a micro-batch at most {max_tokens}; raise it (micro_tokens), or "
                "cut the example where it is made",
                field="examples",
            )
    names = list(examples[0].columns) if examples else []
    for index, example in enumerate(examples):
        if set(example.columns) != set(names):
            raise InputError(
                f"example {index} has columns {sorted(example.columns)}, example 0 {sorted(names)}; expected the same",
                field="examples",
            )
    if len(examples) % together:
        raise InputError(f"{len(examples)} examples do not make groups of {together}", field="examples")
    groups = [sum(lengths[first : first + together]) for first in range(0, len(lengths), together)]
    for index, length in enumerate(groups):
        if length > max_tokens:
            raise InputError(
                f"examples {index * together} to {index * together + together - 1} have {length} tokens together, a "
                f"micro-batch at most {max_tokens}; raise it (micro_tokens)",
                field="examples",
            )
    return [
        _packed(examples, [one * together + i for one in bin for i in range(together)], names, torch.device(device))
        for bin in first_fit(groups, max_tokens)
    ]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of `lengths` in bins of at most `capacity`: the longest first, each into the first bin with room.

    >>> first_fit([3, 5, 2, 4], 7)
    [[1, 2], [0, 3]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[place]
        for index, left in enumerate(room):
            if length <= left:
                bins[index].append(place)
                room[index] -= length
                break
        else:
            bins.append([place])
            room.append(capacity - length)
    return [sorted(places) for places in bins]


def _packed(
    examples: Sequence[Example], places: Sequence[int], names: Iterable[str], device: torch.device
) -> MicroBatch:
    chosen = [examples[place] for place in places]
    # Where the weighted tokens lie in the concatenation; each is predicted by the row before it, in the same sequence.
    weight_T = torch.cat([example.weight for example in chosen])
    targets = weight_T.nonzero().squeeze(1)
    lengths = torch.tensor([len(example.tokens) for example in chosen])
    sequence_R = torch.repeat_interleave(torch.arange(len(chosen)), lengths)[targets]
    positions_R = targets - (lengths.cumsum(0) - lengths)[sequence_R]
    # Nothing is read off the rows from a sequence's last target on: they are not computed.
    read = torch.ones_like(lengths).scatter_reduce_(0, sequence_R, positions_R, "amax")
    whole = ForwardBatch.packed(
        [example.tokens[:num].to(device) for example, num in zip(chosen, read.tolist(), strict=True)]
    )
    batch = whole.sharing()
    rows_R = ((read.cumsum(0) - read)[sequence_R] + positions_R - 1).to(device)

    def take(values_T: Tensor) -> Tensor:
        return values_T[targets].to(device)

    return MicroBatch(
        batch=batch,
        rows_R=rows_R if batch.shared is None else batch.shared.reads_X[rows_R],
        targets_R=take(torch.cat([example.tokens for example in chosen])),
        weight_R=take(weight_T),
        columns={name: take(torch.cat([example.columns[name] for example in chosen])) for name in names},
        sequence_R=sequence_R.to(device),
        positions_R=positions_R.to(device),
        examples=tuple(places),
    )
