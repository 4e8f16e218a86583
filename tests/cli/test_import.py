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
