"""Vocabularies of the shared fixtures, read once a session by a small reader of GGUF metadata."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any

import pytest

from lockstep.tokenize.tokenizer import Tokenizer

VOCABULARIES = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "tokenizers"
SEPARATOR = "\n__ggml_vocab_test__\n"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Metadata:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def unpack(self, letters: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + letters, self._data, self._at)
        self._at += struct.calcsize("<" + letters)
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.unpack("IQ")
            return (
                [self.string() for _ in range(count)]
                if item == _STRING
                else list(self.unpack(f"{count}{_SCALARS[item]}"))
            )
        return self.unpack(_SCALARS[kind])[0]

    def read(self) -> dict[str, Any]:
        _, _, _, count = self.unpack("4sIQQ")
        return {self.string(): self.value(self.unpack("I")[0]) for _ in range(count)}


@functools.cache
def read_metadata(name: str) -> dict[str, Any]:
    path = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"no {path.name} in ../shared/fixtures/tokenizers beside the clone")
    return _Metadata(path.read_bytes()).read()


@functools.cache
def load(name: str) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(read_metadata(name))


@functools.cache
def read_vectors(name: str) -> list[tuple[str, list[int]]]:
    read_metadata(name)
    path = VOCABULARIES / f"ggml-vocab-{name}.gguf.inp"
    texts = path.read_bytes().decode().split(SEPARATOR)
    rows = path.with_suffix(".out").read_text().split("\n")
    return [(text, [int(word) for word in row.split()]) for text, row in zip(texts, rows, strict=True)]
