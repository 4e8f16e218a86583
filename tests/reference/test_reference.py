"""Each framework, where an interpreter that has it is named, makes its networks anew; ours read the files and must agree."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.core.errors import FormatError
from lockstep.interop.readers import load
from tests.interop.stored import arrays

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "tensorflow": "TENSORFLOW",
    "keras": "TENSORFLOW",
    "tf_agents": "TF_AGENTS",
    "keras_rl": "KERAS_RL",
    "paddle": "PADDLE",
    "mxnet": "MXNET",
    "cntk": "CNTK",
    "caffe": "CAFFE",
}
"""make_NAME.py -> LOCKSTEP_..._PYTHON."""
SECONDS = 900
QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "GLOG_minloglevel": "2",
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""Settings of the frameworks' own."""


def regenerate(name: str, folder: Path) -> list[dict[str, object]]:
    """Run make_NAME.py in its framework's interpreter; what it made."""
    python = os.environ.get(f"LOCKSTEP_{SCRIPTS[name]}_PYTHON", "")
    if not python:
        pytest.skip(f"LOCKSTEP_{SCRIPTS[name]}_PYTHON names no interpreter")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | QUIET
    command = [python, str(HERE / f"make_{name}.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=clean, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cases: list[dict[str, object]] = json.loads((folder / "cases.json").read_text())
    assert cases
    return cases


def check(case: dict[str, object], folder: Path) -> float:
    """Largest error relative to the largest value of its output: three batches, and two lengths where it has steps."""
    paths = {key: str(folder / name) for key, name in case.get("paths", {}).items()}
    module = load(folder / str(case["file"]), **case.get("options", {}), **paths)
    stored = arrays(folder / str(case["io"]))
    x, axis, steps = stored["x"], case.get("axis") or 0, case.get("steps")
    wanted = [stored[key] for key in sorted(stored) if key.startswith("y")]
    parts = [(axis, num) for num in (1, 2, x.shape[axis])]
    parts += [] if steps is None else [(steps, x.shape[steps] - 2)]
    worst = 0.0
    for along, num in parts:
        with torch.no_grad():
            outs = module.outputs([torch.from_numpy(np.ascontiguousarray(x.take(range(num), along)))])
        assert len(outs) == len(wanted), f"{case['file']}: {len(outs)} outputs for {len(wanted)}"
        for got, want in zip(outs, wanted, strict=True):
            part = want.take(range(num), along)
            assert tuple(got.shape) == part.shape, f"{case['file']}: {tuple(got.shape)} for {part.shape}"
            worst = max(worst, float(np.abs(got.numpy() - part).max() / np.abs(want).max()))
    return worst


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_what_the_framework_makes_now_is_read_with_equal_outputs(name: str, tmp_path: Path) -> None:
    errors = {str(case["file"]): check(case, tmp_path) for case in regenerate(name, tmp_path)}
    print(name, {file: f"{error:.1e}" for file, error in errors.items()})
    assert {file: error for file, error in errors.items() if not error <= 1e-5} == {}
    for folder in tmp_path.glob("refused_*"):
        with pytest.raises(FormatError, match=r"has the operation|is recurrent"):
            load(folder)
