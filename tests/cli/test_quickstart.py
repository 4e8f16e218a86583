"""The README's first command as a stranger runs it, in an empty folder: trained, drawn, served, asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.cli.main import main
from lockstep.cli.quickstart import QUICKSTARTS
from lockstep.core.env import child_environment


@pytest.mark.slow
def test_control_quickstart_solves_cartpole_and_serves_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lockstep.cli.main", "quickstart", "control"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=child_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "solved: mean return" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert f"run directory    {run.relative_to(tmp_path)}" in done.stdout
    reply = json.loads(done.stdout[done.stdout.index("\n{\n") :].split("\n\nsolved")[0])
    (action,) = (output for output in reply["outputs"] if output["name"] == "action")
    assert action["shape"] == [1]
    assert action["data"][0] in (0, 1)


def test_every_quickstart_is_listed_and_a_mistyped_one_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in QUICKSTARTS)
    assert main(["quickstart", "contorl"]) == 2
    assert "did you mean 'control'?" in capsys.readouterr().err
    assert main(["quickstart", "control", "now"]) == 2
    assert "takes no arguments" in capsys.readouterr().err
