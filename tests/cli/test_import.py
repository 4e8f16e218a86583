"""`lockstep import`: what it tells, writes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx")

from lockstep.cli.main import main
from lockstep.interop import load
from tests.interop.onnx.build import mlp


def test_a_file_is_described_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = mlp(tmp_path / "net.onnx", (4, 8, 2), softmax=True, value=True)
    assert main(["import", str(file), "--out", str(tmp_path / "net"), "--scale", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "input        obs float32 [rows, 4]" in out
    assert "output       out float32 [rows, 2]" in out
    assert "parameters   66 trainable of 66" in out
    assert load(tmp_path / "net").graph.about.scale == 0.5
    assert main(["import", str(tmp_path / "net")]) == 0
    assert "scale        0.5" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = mlp(tmp_path / "net.onnx", (3, 2)), tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    for target in (out, out / "config.json"):
        assert main(["import", str(file), "--out", str(target)]) == 2
        assert "holds something that no import wrote" in capsys.readouterr().err
    assert (out / "config.json").read_text() == "{}"
    assert main(["import", str(tmp_path)]) == 2
    assert "those with saved_model.pb are read" in capsys.readouterr().err


def test_another_network_in_the_same_folder_leaves_nothing_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(mlp(tmp_path / "net.onnx", (3, 2))), "--out", str(tmp_path / "new")]) == 0
    assert "RECIPE" in capsys.readouterr().out
    (tmp_path / "new" / "original" / "net.caffemodel").write_bytes(b"of another import")
    assert main(["import", str(tmp_path / "net.onnx"), "--out", str(tmp_path / "new")]) == 0
    assert list(load(tmp_path / "new").original) == ["model.onnx"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("net.onnx", b"\x08\x07garbage", "net.onnx"),
        ("net.onnx", b"", "no graph with outputs"),
        ("net.xyz", b"1", "no format that is known here"),
        ("none.onnx", None, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_told(
    name: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["import", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert main(["import", str(tmp_path / name), "--format", "onxx"]) == 2
    assert "did you mean 'onnx'" in capsys.readouterr().err
