"""The reader agrees with the format's own package, and no file, however broken, does worse than a `FormatError`."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from lockstep.core.errors import FormatError, InputError
from lockstep.interop.gguf import GGUFFile, ValueType
from lockstep.interop.gguf.container import MAX_DEPTH


def reference_file(path: Path, big_endian: bool = False) -> Path:
    """A small file by the format's own writer."""
    endian = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_block_count(2)
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -3)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -300)
    writer.add_int32("t.i32", -70000)
    writer.add_uint64("t.u64", 1 << 60)
    writer.add_int64("t.i64", -(1 << 60))
    writer.add_float32("t.f32", 0.1)
    writer.add_float64("t.f64", 0.1)
    writer.add_bool("t.yes", True)
    writer.add_string("t.text", "grüß dich ☺")
    writer.add_array("t.strings", ["a", "", "ü" * 40])
    writer.add_array("t.floats", [0.5, -1.5])
    writer.add_array("t.bools", [True, False])
    rng = np.random.default_rng(0)
    for name, shape in (("a", (3, 64)), ("b", (5,)), ("c", (2, 2, 32))):
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    raw = gguf.quants.quantize(rng.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference_file(tmp_path_factory.mktemp("gguf") / "x.gguf")


def test_agrees_with_the_formats_own_reader(path: Path) -> None:
    ours, theirs = GGUFFile.open(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.info(tensor.name)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.type.name, info.start) == (tensor.tensor_type.name, tensor.data_offset)
        assert np.array_equal(ours.tensor_bytes(tensor.name), tensor.data.reshape(-1).view(np.uint8))
    own = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(own)
    for key, field in own.items():
        value = ours.value(key)
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
        assert ours.metadata[key].type == field.types[0]
    assert ours.metadata["t.u16"].type is ValueType.UINT16
    assert ours.metadata["t.strings"].item_type is ValueType.STRING


def test_every_type_has_the_packages_size() -> None:
    from lockstep.interop.gguf.formats import TENSOR_TYPES

    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        ours = TENSOR_TYPES[kind.value]
        assert (ours.name, ours.block_size, ours.block_bytes) == (kind.name, block, size)


@pytest.mark.parametrize("strings", [[b"a", b"\xc3", b"\xa9", b""], [b"a\0b", b"\0", b"c"], []])
def test_lists_of_strings_keep_every_byte(strings: list[bytes]) -> None:
    items = b"".join(struct.pack("<Q", len(item)) + item for item in strings)
    found = GGUFFile.from_bytes(container([field("k", 9, array(8, len(strings), items))])).value("k")
    assert [item.encode("utf-8", "surrogateescape") for item in found] == strings


def test_tensor_bytes_are_no_copy(path: Path) -> None:
    file = GGUFFile.open(path)
    assert np.shares_memory(file.tensor_bytes("a"), file.parts[0])
    with pytest.raises(InputError, match="did you mean 'q'"):
        file.tensor_bytes("qq")


def test_version_2_is_read_and_others_refused(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    assert GGUFFile.from_bytes(data).version == 2
    for version in (0, 1, 4):
        data[4:8] = struct.pack("<I", version)
        with pytest.raises(FormatError, match=f"version {version}"):
            GGUFFile.from_bytes(data)


def test_big_endian_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="big-endian"):
        GGUFFile.open(reference_file(tmp_path / "big.gguf", big_endian=True))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, words in (("none.gguf", "does not exist"), ("", "not a file"), ("empty.gguf", "cannot be read")):
        with pytest.raises(FormatError, match=words):
            GGUFFile.open(tmp_path / name)
    with pytest.raises(FormatError, match="not a GGUF file"):
        GGUFFile.open(tmp_path / "text.gguf")


def split_file(path: Path, number: int, count: int, total: int, name: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", total)
    writer.add_tensor(name, np.full((2, 32), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_split_models(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, path in enumerate(paths):
        split_file(path, number, 2, 2, f"t{number}")
    file = GGUFFile.open(paths[0])
    for number in (0, 1):
        assert (file.tensor_bytes(f"t{number}").view(np.float32) == number).all()
    with pytest.raises(FormatError, match="open the first"):
        GGUFFile.open(paths[1])
    split_file(paths[1], 1, 2, 2, "t0")
    with pytest.raises(FormatError, match="'t0', which an earlier file has"):
        GGUFFile.open(paths[0])
    split_file(paths[1], 0, 2, 2, "t1")
    with pytest.raises(FormatError, match="not file 2 of 2"):
        GGUFFile.open(paths[0])
    paths[1].unlink()
    with pytest.raises(FormatError, match=r"m-00002-of-00002\.gguf: does not exist"):
        GGUFFile.open(paths[0])
    split_file(paths[1], 1, 2, 2, "t1")
    split_file(paths[0], 0, 2, 3, "t0")
    with pytest.raises(FormatError, match="speaks of 3 tensors, its files hold 2"):
        GGUFFile.open(paths[0])


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def row(name: str = "t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def container(fields: list[bytes] = [], rows: list[bytes] = [], counts: tuple[int, int] | None = None) -> bytes:  # noqa: B006
    num_rows, num_fields = counts or (len(rows), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", 3, num_rows, num_fields) + b"".join(fields) + b"".join(rows)
    return head + b"\0" * (-len(head) % 32) + b"\0" * 256


def field(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(item: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + payload


HOSTILE = {
    "tensor count": (container(counts=(1 << 60, 0)), "claims 1152921504606846976 tensors"),
    "field count": (container(counts=(0, 1 << 60)), "claims 1152921504606846976 metadata"),
    "key length": (container([struct.pack("<Q", 1 << 62)]), "key of metadata field 0"),
    "string length": (container([field("k", 8, struct.pack("<Q", 1 << 62))]), "'k'.*claims"),
    "string past the end": (container([field("k", 8, struct.pack("<Q", 9999))]), "'k'.*needs 9999 bytes"),
    "key not utf-8": (container([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)]), "not UTF-8"),
    "value type": (container([field("k", 13, b"\0" * 8)]), "value type 13"),
    "item type": (container([field("k", 9, array(77, 1))]), "value type 77"),
    "array length": (container([field("k", 9, array(4, 1 << 60))]), "claims 1152921504606846976 items"),
    "last string cut": (container([field("k", 9, array(8, 2, text("a") + struct.pack("<Q", 9999)))]), "item 1 of.*'k'"),
    "strings in array": (container([field("k", 9, array(8, 1 << 60))]), "items"),
    "nesting": (container([field("k", 9, array(9, 1) * 1000 + array(0, 0))]), f"deeper than {MAX_DEPTH}"),
    "key twice": (container([field("k", 0, b"\1")] * 2), "'k' appears twice"),
    "alignment 0": (container([field("general.alignment", 4, struct.pack("<I", 0))]), "power of two"),
    "alignment 48": (container([field("general.alignment", 4, struct.pack("<I", 48))]), "power of two"),
    "alignment type": (container([field("general.alignment", 8, text("32"))]), "power of two"),
    "tensor twice": (container(rows=[row(), row()]), "'t' appears twice"),
    "rank": (container(rows=[text("t") + struct.pack("<I", 5) + b"\1" * 64]), "5 dimensions"),
    "huge rank": (container(rows=[text("t") + struct.pack("<I", 1 << 31)]), "dimensions"),
    "zero size": (container(rows=[row(dims=(32, 0))]), r"shape \[0, 32\]"),
    "huge shape": (container(rows=[row(dims=(1 << 63, 1 << 63, 1 << 63, 1 << 63))]), "spans bytes"),
    "unknown type": (container(rows=[row(kind=999)]), "type 999"),
    "removed type": (container(rows=[row(kind=4)]), "type 4"),
    "row no whole block": (container(rows=[row(dims=(33,), kind=2)]), "multiple of the 32 of Q4_0"),
    "out of bounds": (container(rows=[row(offset=1 << 40)]), "spans bytes"),
    "offset wraps": (container(rows=[row(offset=(1 << 64) - 32)]), "spans bytes"),
    "misaligned": (container(rows=[row(offset=8)]), "alignment 32"),
    "overlap": (container(rows=[row("a"), row("b", offset=32)]), "'a' and 'b' overlap"),
    "same place": (container(rows=[row("a"), row("b")]), "overlap"),
    "tensor name length": (container(rows=[struct.pack("<Q", 1 << 50)]), "name of tensor 0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str) -> None:
    data, words = HOSTILE[name]
    start = time.perf_counter()
    with pytest.raises(FormatError, match=words):
        GGUFFile.from_bytes(data, "evil.gguf")
    assert time.perf_counter() - start < 0.2


def test_many_empty_strings_are_refused_before_they_cost_anything() -> None:
    """A large file of zeros may claim tens of millions of strings that all fit."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field("k", 9, array(8, 5_000_000))
    start = time.process_time()
    with pytest.raises(FormatError, match="strings together"):
        GGUFFile.from_bytes(head + bytes(40_000_000))
    assert time.process_time() - start < 0.2


def test_truncation_anywhere_is_an_error(path: Path) -> None:
    """Also inside tensor data. Only padding after the last tensor may be missing."""
    data = path.read_bytes()
    end = max(info.start + info.num_bytes for info in GGUFFile.open(path).tensors.values())
    for length in range(0, end):
        with pytest.raises(FormatError):
            GGUFFile.from_bytes(data[:length])
    assert GGUFFile.from_bytes(data[:end]).tensors


def test_fuzz(path: Path) -> None:
    """Flipped bytes, overwritten words, cut-outs: an error of ours or a file whose tensors all lie inside it."""
    data = path.read_bytes()
    header = min(info.start for info in GGUFFile.open(path).tensors.values())
    rng = np.random.default_rng(0)
    num_errors = num_cases = 0
    nasty = [0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 63) - 1, (1 << 64) - 1]
    for case in range(3000):
        damaged = bytearray(data)
        at = int(rng.integers(header))
        if case % 3 == 0:
            for _ in range(int(rng.integers(1, 4))):
                damaged[int(rng.integers(header))] = int(rng.integers(256))
        elif case % 3 == 1:
            damaged[at : at + 8] = struct.pack("<Q", nasty[int(rng.integers(len(nasty)))])
        else:
            del damaged[at : at + int(rng.integers(1, 40))]
        num_cases += 1
        try:
            file = GGUFFile.from_bytes(damaged)
        except FormatError:
            num_errors += 1
            continue
        for name, info in file.tensors.items():
            assert len(file.tensor_bytes(name)) == info.num_bytes
    assert num_cases == 3000
    assert 500 < num_errors < 3000
