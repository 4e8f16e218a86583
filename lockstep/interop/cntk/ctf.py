"""CNTK's text format (CTF) as a data set: dense, sparse and ragged inputs, sharded over files, larger than memory.

A line is `[sequence id] |name value value ... |name index:value ... |# a comment`. Lines that follow each other with one id are
a sequence; without ids each line is one. An input may stand on fewer lines of a sequence than others (a label once).

    files -> index of chunks (one pass) -> chunks in shuffled order -> sequences shuffled inside a window -> batches

Only the index and a window of chunks are in memory. The order depends on seed and epoch alone, so a position can be
returned to.

Legend: B sequences of a batch, T steps of one, V entries of a sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError, FormatError, unknown_name

Batch = dict[str, Tensor | list[Tensor]]
MAX_LINE_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class CTFStream:
    """One input of the file."""

    dim: int
    """Entries of a sample."""
    name: str = ""
    """What the file calls it (default: the stream's own name)."""
    is_sparse: bool = False
    """Whether samples are `index:value` pairs."""
    is_sequence: bool = False
    """Whether sequences have any number of samples (a list of [T, dim] in a batch); else exactly one ([B, dim])."""


@dataclass(frozen=True)
class Chunk:
    """Whole sequences that lie together: file, first byte, bytes, number of the first line, sequences."""

    file: int
    start: int
    num_bytes: int
    line: int
    num_sequences: int


Sample = tuple[list[int], list[float]]
"""Indices (empty for dense) and values."""
Parsed = dict[str, list[Sample]]


class CTFDataset:
    """Files in CTF as batches of tensors.

    Args:
        files: one file or several; sequence ids are of one file.
        streams: inputs to read, by the name they get in a batch; the others are passed over.
        chunk_bytes: about how much is read at once.
        window_chunks: chunks whose sequences are shuffled among each other and held in memory.

    Raises:
        FormatError: a file is missing or empty, or a line is too long; names file and byte.
        ConfigError: a setting is out of range.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "data.ctf"
    >>> _ = path.write_text("0 |x 1 2 |y 0:1\\n0 |x 3 4\\n1 |x 5 6 |y 2:1\\n")
    >>> data = CTFDataset(path, {"x": CTFStream(dim=2, is_sequence=True), "y": CTFStream(dim=3, is_sparse=True)})
    >>> batch = next(data.batches(2, shuffle=False))
    >>> [x.tolist() for x in batch["x"]], batch["y"].to_dense().argmax(1).tolist(), len(data)
    ([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]], [0, 2], 2)
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        streams: Mapping[str, CTFStream],
        *,
        chunk_bytes: int = 1 << 20,
        window_chunks: int = 8,
    ) -> None:
        self.files = [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]
        if not self.files or not streams:
            raise ConfigError("a CTF data set needs at least one file and one stream")
        if chunk_bytes < 1 or window_chunks < 1:
            raise ConfigError(f"chunk_bytes={chunk_bytes}, window_chunks={window_chunks} must be at least 1")
        for name, stream in streams.items():
            if not 1 <= stream.dim < 1 << 40:
                raise ConfigError(f"stream {name!r}: dim={stream.dim} must be at least 1")
        self.streams = dict(streams)
        self._by_file_name = {stream.name or name: name for name, stream in streams.items()}
        if len(self._by_file_name) != len(self.streams):
            raise ConfigError("two streams read the same input")
        self.window_chunks = window_chunks
        self.chunks = [chunk for number in range(len(self.files)) for chunk in self._index(number, chunk_bytes)]
        if not self.chunks:
            raise FormatError("holds no sequences", path=str(self.files[0]))

    def __len__(self) -> int:
        """Sequences in all files."""
        return sum(chunk.num_sequences for chunk in self.chunks)

    def _open(self, number: int) -> BinaryIO:
        try:
            return self.files[number].open("rb")
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", path=str(self.files[number])) from error

    def _index(self, number: int, chunk_bytes: int) -> Iterator[Chunk]:
        """Cut a file into chunks at the starts of sequences."""
        start = position = sequences = line_number = first_line = 0
        last_id: bytes | None = None
        with self._open(number) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise FormatError(
                        f"a line is longer than {MAX_LINE_BYTES} bytes", path=str(file.name), offset=position
                    )
                line_number += 1
                if line.strip():
                    identity = _sequence_id(line)
                    if identity is None or identity != last_id or sequences == 0:
                        if position - start >= chunk_bytes and sequences:
                            yield Chunk(number, start, position - start, first_line, sequences)
                            start, sequences, first_line = position, 0, line_number - 1
                        sequences += 1
                    last_id = identity
                position += len(line)
        if sequences:
            yield Chunk(number, start, position - start, first_line, sequences)

    def sequences(self, chunk: Chunk) -> Iterator[Parsed]:
        """The sequences of one chunk.

        Raises:
            FormatError: a line that is not CTF or does not fit the streams; names file, byte and line.
        """
        with self._open(chunk.file) as file:
            file.seek(chunk.start)
            data = file.read(chunk.num_bytes)
        current: Parsed = {}
        last_id: bytes | None = None
        position, begun = chunk.start, False
        for number, line in enumerate(data.splitlines(keepends=True), chunk.line + 1):
            if line.strip():
                identity = _sequence_id(line)
                if begun and (identity is None or identity != last_id):
                    yield self._checked(current, chunk, position, number)
                    current = {}
                begun, last_id = True, identity
                self._parse(line, current, self._place(chunk, position, number))
            position += len(line)
        if begun:
            yield self._checked(current, chunk, position, number)

    def _place(self, chunk: Chunk, position: int, line: int) -> tuple[str, int, int]:
        return str(self.files[chunk.file]), position, line

    def _parse(self, line: bytes, into: Parsed, place: tuple[str, int, int]) -> None:
        path, position, number = place
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"line {number} is not UTF-8 text", path=path, offset=position) from error
        # A pipe inside a comment is written `#|`.
        for part in text.replace("#|", "\0").split("|")[1:]:
            if part.startswith("#"):
                continue
            words = part.split()
            if not words:
                raise FormatError(f"line {number}: a '|' without a name", path=path, offset=position)
            name = self._by_file_name.get(words[0])
            if name is None:
                continue
            try:
                sample = _sample(words[1:], self.streams[name])
            except ValueError as error:
                raise FormatError(f"line {number}: input {words[0]!r}: {error}", path=path, offset=position) from error
            into.setdefault(name, []).append(sample)

    def _checked(self, sequence: Parsed, chunk: Chunk, position: int, line: int) -> Parsed:
        for name, stream in self.streams.items():
            num = len(sequence.get(name, ()))
            if num == 0 or (num > 1 and not stream.is_sequence):
                label = stream.name or name
                known = unknown_name("input", label, [*sequence]) if num == 0 else "is_sequence=True would allow it"
                raise FormatError(
                    f"line {line}: the sequence that ends here has {num} samples of {label!r}, "
                    f"{'at least 1' if stream.is_sequence else '1'} expected; {known}",
                    path=str(self.files[chunk.file]),
                    offset=position,
                )
        return sequence

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        skip: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """One pass over the data; the last batch may be smaller.

        Args:
            batch_size: sequences of a batch.
            seed, epoch: what the order depends on.
            shuffle: False keeps the order of the files.
            skip: batches to leave out at the start, to return to a position.
            shard: (worker, number of workers): each reads its own chunks.

        Raises:
            FormatError: a damaged line.
            ConfigError: batch_size or shard is out of range.
        """
        worker, num_workers = shard
        if batch_size < 1 or skip < 0 or not 0 <= worker < num_workers:
            raise ConfigError(f"batch_size={batch_size}, skip={skip}, shard={shard}")
        waiting: list[Parsed] = []
        made = 0
        for sequence in self._ordered(random.Random(f"{seed}/{epoch}") if shuffle else None, worker, num_workers):
            waiting.append(sequence)
            if len(waiting) == batch_size:
                made += 1
                if made > skip:
                    yield self._batch(waiting)
                waiting = []
        if waiting and made >= skip:
            yield self._batch(waiting)

    def _ordered(self, order: random.Random | None, worker: int, num_workers: int) -> Iterator[Parsed]:
        chunks = list(self.chunks)
        if order is not None:
            order.shuffle(chunks)
        chunks = chunks[worker::num_workers]
        step = 1 if order is None else self.window_chunks
        for first in range(0, len(chunks), step):
            if order is None:
                yield from self.sequences(chunks[first])
                continue
            window = [sequence for chunk in chunks[first : first + step] for sequence in self.sequences(chunk)]
            order.shuffle(window)
            yield from window

    def _batch(self, sequences: list[Parsed]) -> Batch:
        batch: Batch = {}
        for name, stream in self.streams.items():
            if stream.is_sequence:
                batch[name] = [_tensor(sequence[name], stream) for sequence in sequences]
            else:
                batch[name] = _tensor([sequence[name][0] for sequence in sequences], stream)
        return batch


def _sequence_id(line: bytes) -> bytes | None:
    head, _, _ = line.partition(b"|")
    return head.strip() or None


def _sample(words: list[str], stream: CTFStream) -> Sample:
    if not stream.is_sparse:
        if len(words) != stream.dim:
            raise ValueError(f"{len(words)} values, {stream.dim} expected")
        return [], [_number(word) for word in words]
    indices, values = [], []
    for word in words:
        index, colon, value = word.partition(":")
        if not colon or not index.isdigit() or int(index) >= stream.dim:
            raise ValueError(f"{word!r} is not index:value with an index below {stream.dim}")
        indices.append(int(index))
        values.append(_number(value))
    return indices, values


def _number(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word!r} is not finite")
    return value


def _tensor(samples: list[Sample], stream: CTFStream) -> Tensor:
    """Samples as rows, [len(samples), dim]."""
    if not stream.is_sparse:
        return torch.tensor([values for _, values in samples])
    rows = [row for row, (indices, _) in enumerate(samples) for _ in indices]
    columns = [index for indices, _ in samples for index in indices]
    values = [value for _, sample in samples for value in sample]
    size = (len(samples), stream.dim)
    indices = torch.tensor([rows, columns], dtype=torch.long).reshape(2, -1)
    return torch.sparse_coo_tensor(
        indices, torch.tensor(values, dtype=torch.float32), size, check_invariants=True
    ).coalesce()
