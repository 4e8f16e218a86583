"""`lockstep bench imports`: a row that meets its line, one that does not, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lockstep.cli.main import main
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[1] / "fixtures" / "frameworks"


def _run(fixtures: Path, only: str, out: Path, *more: str) -> tuple[int, list[dict[str, object]]]:
    words = ["bench", "imports", "--fixtures", str(fixtures), "--only", only, "--json", str(out), "--present", *more]
    status = main(words)
    return status, json.loads(out.read_text())["rows"]


def test_rows_meet_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = _run(FILES, "paddle/lstm.", tmp_path / "rows.json")
    assert status == 0
    assert [row["file"] for row in rows] == ["paddle/lstm.json", "paddle/lstm.pdparams"]
    for row in rows:
        assert row["trainable"] == row["total"] == 5541
        assert (row["batches"], row["failures"]) == ([1, 2, 3], [])
        assert row["error"] <= 1e-5
    assert rows[0]["lengths"] == [3, 5]
    assert "every weight" in capsys.readouterr().out


def test_an_ended_run_goes_on_with_the_rows_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    _, rows = _run(FILES, "paddle/lstm.json", out)
    document = json.loads(out.read_text())
    document["rows"][0]["trainable"] = 7
    out.write_text(json.dumps(document))
    status, rows = _run(FILES, "paddle/lstm.", out, "--resume")
    assert (status, [row["trainable"] for row in rows]) == (0, [7, 5541])
    document["versions"]["commit"] = "another"
    out.write_text(json.dumps(document))
    status, _ = _run(FILES, "paddle/lstm.", out, "--resume")
    assert status != 0
    assert "start anew" in "".join(capsys.readouterr())


def test_another_output_or_a_damaged_file_fails(tmp_path: Path) -> None:
    folder = tmp_path / "paddle"
    folder.mkdir()
    for name in ("mlp.json", "mlp.pdiparams", "mlp.pdparams"):
        shutil.copy(FILES / "paddle" / name, folder / name)
    stored = arrays(FILES / "paddle" / "mlp_io.npz")
    np.savez(folder / "mlp_io.npz", **{**stored, "y1": stored["y1"] * 1.001})
    (folder / "mlp.pdparams").write_bytes(b"damaged")
    status, rows = _run(tmp_path, "paddle/mlp.", tmp_path / "rows.json")
    assert status == 1
    assert "relative error" in str(rows[0]["failures"])
    assert "FormatError" in str(rows[1]["failures"])
