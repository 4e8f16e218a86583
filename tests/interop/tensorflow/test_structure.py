"""Graphs of TensorFlow are looked through before TensorFlow is started; a converter that crashes is an error too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lockstep.core.errors import FormatError
from lockstep.interop.readers import load
from lockstep.interop.tensorflow.structure import check_graph_file, check_saved_model
from lockstep.interop.wire import encode_bytes, encode_varint

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks"


def node(name: str, op: str, *inputs: str, **attributes: bytes) -> bytes:
    parts = [encode_bytes(1, name.encode()), encode_bytes(2, op.encode())]
    parts += [encode_bytes(3, text.encode()) for text in inputs]
    for key, value in attributes.items():
        parts.append(encode_bytes(5, encode_bytes(1, key.encode()) + encode_bytes(2, value)))
    return encode_bytes(1, b"".join(parts))


def constant(size: int) -> bytes:
    shape = encode_bytes(2, encode_bytes(2, encode_varint(1, size)))
    return encode_bytes(8, encode_varint(1, 1) + shape + encode_bytes(5, b"\0\0\0\0"))


def test_files_of_the_real_tensorflow_pass() -> None:
    check_graph_file(FILES / "tf" / "tf1_frozen.pb", "Graph")
    check_graph_file(FILES / "tf" / "tf1_model.ckpt.meta", "MetaGraph")
    for folder in (FILES / "tf" / "mlp_saved", FILES / "keras2" / "dqn_policy", FILES / "tfagents" / "td3"):
        check_saved_model(folder)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (node("a", "Const", value=constant(1 << 40)), r"g\.pb: byte \d+: a constant of shape .* would take"),
        (node("a", "Tanh", "b:0"), r"g\.pb: byte \d+: reads 'b', which nothing"),
        (node("a", "Placeholder") * 2, r"g\.pb: byte \d+: a second operation is called 'a'"),
        (node("a", "WriteFile"), r"g\.pb, byte \d+: operation WriteFile: reaches files"),
        (node("a", "PrintV2", output_stream=encode_bytes(2, b"file:///x")), r"byte \d+: operation PrintV2: reaches"),
        (encode_varint(1, 7), r"g\.pb: byte 0: field 1 should hold a message"),
    ],
)
def test_what_is_wrong_is_named_with_its_byte(graph: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "g.pb").write_bytes(graph)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "g.pb", python="/nowhere")


def test_a_saved_model_without_its_variables(tmp_path: Path) -> None:
    shutil.copytree(FILES / "tf" / "mlp_saved", tmp_path / "net")
    data = tmp_path / "net" / "variables" / "variables.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:20_000])
    with pytest.raises(FormatError, match=r"variables\.data-00000-of-00001, byte \d+: tensor .* truncated"):
        load(tmp_path / "net")
    data.unlink()
    with pytest.raises(FormatError, match=r"variables\.data-00000-of-00001: holds tensor .* cannot be read"):
        load(tmp_path / "net" / "saved_model.pb")
    (tmp_path / "net" / "variables" / "variables.index").unlink()
    with pytest.raises(FormatError, match=r"variables\.index: does not exist"):
        load(tmp_path / "net")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -SEGV $$", r"tf1_frozen\.pb: the converter of tensorflow crashes on it \(SIGSEGV\)"),
        ("printf 'Traceback:\\n  ^^\\nValueError: so\\n' >&2; exit 1", r"refuses it: ValueError: so$"),
    ],
)
def test_a_converter_that_ends_badly(script: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(FormatError, match=message):
        load(FILES / "tf" / "tf1_frozen.pb", python=str(tmp_path / "python"))
