"""A network that came from Paddle as ONNX, tuned here, and taken back by X2Paddle: the real Paddle computes what ours does.

LOCKSTEP_X2PADDLE_PYTHON names an interpreter with paddlepaddle and x2paddle (which imports onnx, six, sympy, pandas and
requests without asking for all of them). X2Paddle 1.6 knows neither GRU nor LayerNormalization, which the other two
files have.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

from lockstep.interop.onnx import save_onnx
from lockstep.interop.readers import load
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks" / "paddle"
PYTHON = os.environ.get("LOCKSTEP_X2PADDLE_PYTHON", "")
BACK = """
import sys
import numpy as np, paddle
from x2paddle.convert import onnx2paddle
for name in sys.argv[1:]:
    onnx2paddle(name + ".onnx", name, convert_to_lite=False)
    net, x = paddle.jit.load(name + "/inference_model/model"), np.load(name + ".npy")
    np.savez(name + ".npz", *[y.numpy() for num in (1, len(x)) for y in net(paddle.to_tensor(x[:num]))])
"""
NETS = ("cnn", "lstm")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PYTHON, reason="LOCKSTEP_X2PADDLE_PYTHON names no interpreter")
def test_tuned_weights_go_back_to_paddle_through_x2paddle(tmp_path: Path) -> None:
    rng, wanted = torch.Generator().manual_seed(0), {}
    for name in NETS:
        module, x = load(FILES / f"{name}_pexport.onnx"), arrays(FILES / f"{name}_io.npz")["x"]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.02)
            wanted[name] = [y.numpy() for num in (1, len(x)) for y in module.outputs([torch.from_numpy(x[:num])])]
        save_onnx(module, tmp_path / f"{name}.onnx")
        np.save(tmp_path / f"{name}.npy", x)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [PYTHON, "-c", BACK, *(str(tmp_path / name) for name in NETS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=clean, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in NETS:
        found = arrays(tmp_path / f"{name}.npz")
        original = arrays(FILES / f"{name}_io.npz")["y0"]
        for got, want in zip(found.values(), wanted[name], strict=True):
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
        assert np.abs(found["arr_2"] - original).max() > 1e-4  # they are the tuned ones
