"""`lockstep bench kernels`: one tiny run, its table and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lockstep.cli import bench_kernels
from lockstep.cli.main import main
from lockstep.kernels import native

needs_library = pytest.mark.skipif(native.state.library is None, reason="no compiled kernels")


@needs_library
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "SHAPES", ((64, 96), (96, 64)))
    monkeypatch.setattr(bench_kernels, "STREAMED_BYTES", 1 << 20)
    path, threads = tmp_path / "figures.json", torch.get_num_threads()
    options = ["--seconds", "0.01", "--rows", "3", "--threads", "1", "--json", str(path), "--formats", "bf16", "int4"]
    assert main(["bench", "kernels", *options]) == 0
    figures = json.loads(path.read_text())
    assert list(figures["formats"]) == ["bf16", "int4"]
    assert all(value > 0 for figure in figures["formats"].values() for value in figure.values())
    assert figures["limits"]["read_gb_s"] > 0
    assert json.loads(figures["versions"]["kernels"])["level"] == native.describe()["level"]
    assert "torch bf16" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


@needs_library
def test_no_figure_without_the_twin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_kernels, "SHAPES", ((64, 96),))
    monkeypatch.setattr(bench_kernels, "STREAMED_BYTES", 1 << 20)
    right = bench_kernels.packed_linear
    monkeypatch.setattr(
        bench_kernels, "packed_linear", lambda x, packed: right(x, packed) * (1.0 + native.state.fast * 1e-3)
    )
    assert main(["bench", "kernels", "--seconds", "0.01", "--rows", "3", "--threads", "1"]) == 2
    assert "differs from its naive twin" in capsys.readouterr().err


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--formats", "int9"]) == 2
    assert "unknown weight format" in capsys.readouterr().err


def test_every_benchmark_says_which_kernels_it_used() -> None:
    folder = Path(bench_kernels.__file__).parent
    silent = {path.name for path in folder.glob("*.py") if "describe_versions" in path.read_text()}
    # The importers' benchmark runs other frameworks' files, and goes on only where its versions are the same.
    assert silent == {"figures.py", "bench_imports.py"}
