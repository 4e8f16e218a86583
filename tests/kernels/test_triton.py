"""The GPU's kernels in Triton's interpreter, in a process of its own that has it switched on: each op against its reference,
gradients too, and a row's bits whatever rows are beside it. On a machine with a GPU the same cases run on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
def test_ops_agree_with_their_references() -> None:
    pytest.importorskip("triton")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(Path(__file__).parent / "triton_cases.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "all 9 ops agree" in result.stdout
