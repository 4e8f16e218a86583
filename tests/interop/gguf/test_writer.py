"""What we write, the format's own package reads, and so do we."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from lockstep.core.errors import ConfigError, InputError
from lockstep.interop.gguf import QUANTISERS, Field, GGUFFile, TensorData, ValueType, quantise, write_gguf

METADATA = {
    "general.architecture": "llama",
    "k.yes": True,
    "k.small": 7,
    "k.negative": -7,
    "k.large": 1 << 40,
    "k.real": 0.25,
    "k.text": "grüß ☺",
    "k.strings": ["a", "", "bc"],
    "k.numbers": [1, -2, 3],
    "k.array": np.arange(5, dtype=np.int8),
    "k.typed": Field(ValueType.UINT16, 9),
}


def plain(array: np.ndarray, kind: str = "F32") -> TensorData:
    raw = quantise(kind, array)
    return TensorData(kind, array.shape, lambda: raw)


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_package_reads_every_format(tmp_path: Path, alignment: int) -> None:
    values = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    tensors = {kind.lower(): plain(values, kind) for kind in QUANTISERS}
    tensors["vector"] = plain(values[0, :5])
    write_gguf(tmp_path / "x.gguf", METADATA, tensors, alignment=alignment)
    ours, theirs = GGUFFile.open(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    assert [tensor.name for tensor in theirs.tensors] == list(tensors)
    for tensor in theirs.tensors:
        assert tensor.tensor_type.name == tensors[tensor.name].kind
        assert np.array_equal(tensor.data.reshape(-1).view(np.uint8), tensors[tensor.name].make().reshape(-1))
        assert ours.info(tensor.name).start % alignment == 0
        assert np.array_equal(ours.tensor_bytes(tensor.name), tensors[tensor.name].make().reshape(-1))
    for key, value in METADATA.items():
        want = value.value if isinstance(value, Field) else value
        got = theirs.fields[key].contents()
        assert got == (want.tolist() if isinstance(want, np.ndarray) else want), key
    assert ours.metadata["k.small"].type is ValueType.UINT32
    assert ours.metadata["k.negative"].type is ValueType.INT32
    assert ours.metadata["k.large"].type is ValueType.UINT64
    assert ours.metadata["k.typed"].type is ValueType.UINT16
    assert ours.metadata["k.array"].item_type is ValueType.INT8


def test_what_was_read_is_written_again(tmp_path: Path) -> None:
    """Fields keep their types through a second file, byte for byte."""
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    first, second = tmp_path / "1.gguf", tmp_path / "2.gguf"
    write_gguf(first, METADATA, {"t": plain(values)})
    write_gguf(second, GGUFFile.open(first).metadata, {"t": plain(values)})
    assert first.read_bytes() == second.read_bytes()


def test_tokens_that_are_not_utf8_survive(tmp_path: Path) -> None:
    token = b"\xe2\x98".decode("utf-8", "surrogateescape")
    write_gguf(tmp_path / "x.gguf", {"tokens": [token, "b"]}, {})
    assert GGUFFile.open(tmp_path / "x.gguf").value("tokens") == [token, "b"]


def test_nothing_half_written_remains(tmp_path: Path) -> None:
    """A tensor that fails in the middle leaves the old file as it was and no other."""
    path = tmp_path / "x.gguf"
    write_gguf(path, METADATA, {"t": plain(np.zeros((1, 32), np.float32))})
    before = path.read_bytes()
    short = TensorData("F32", (2, 32), lambda: np.zeros(5, np.float32))
    with pytest.raises(InputError, match="'t' has 20 bytes, expected 256"):
        write_gguf(path, METADATA, {"t": short})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"k": None}, "cannot be stored"),
        ({"k": []}, "no item type"),
        ({"k": [1, "a"]}, "different types"),
        ({"k": 1 << 70}, "cannot be stored"),
        ({"k": Field(ValueType.UINT8, 300)}, "not a UINT8"),
        ({"k": Field(ValueType.STRING, 3)}, "not a STRING"),
        ({"k": np.zeros((2, 2))}, "cannot be stored"),
    ],
)
def test_metadata_that_cannot_be_stored(tmp_path: Path, metadata: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        write_gguf(tmp_path / "x.gguf", metadata, {})


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alignment 24"):
        write_gguf(tmp_path / "x.gguf", {}, {}, alignment=24)
    with pytest.raises(InputError, match=r"Q4_0 of shape \[2, 33\]"):
        write_gguf(tmp_path / "x.gguf", {}, {"t": TensorData("Q4_0", (2, 33), lambda: np.zeros(1))})
    with pytest.raises(InputError, match="unknown tensor type"):
        write_gguf(tmp_path / "x.gguf", {}, {"t": TensorData("Q9", (2, 32), lambda: np.zeros(1))})
    with pytest.raises(ConfigError, match=r"must end in \.gguf"):
        write_gguf(tmp_path / "x.bin", {}, {})
