"""`lockstep caffe train`, `test` and `time`, as Caffe's users type them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lockstep.cli.main import main
from lockstep.interop.caffe.reader import read_weights

NET = """
name: "q"
layer { name: "obs" type: "Input" top: "obs" include { phase: TRAIN } input_param { shape { dim: 16 dim: 4 } } }
layer { name: "obs" type: "Input" top: "obs" include { phase: TEST } input_param { shape { dim: 8 dim: 4 } } }
layer { name: "label" type: "Input" top: "label" include { phase: TRAIN } input_param { shape { dim: 16 } } }
layer { name: "label" type: "Input" top: "label" include { phase: TEST } input_param { shape { dim: 8 } } }
layer { name: "fc1" type: "InnerProduct" bottom: "obs" top: "fc1" param { lr_mult: 1 } param { lr_mult: 2 }
        inner_product_param { num_output: 16 weight_filler { type: "xavier" } } }
layer { name: "r1" type: "ReLU" bottom: "fc1" top: "fc1" }
layer { name: "out" type: "InnerProduct" bottom: "fc1" top: "out" inner_product_param { num_output: 2 weight_filler { type: "xavier" } } }
layer { name: "accuracy" type: "Accuracy" bottom: "out" bottom: "label" top: "accuracy" include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "out" bottom: "label" top: "loss" }
"""  # noqa: E501
SOLVER = """
net: "net.prototxt" type: "SGD" base_lr: 0.5 momentum: 0.9 lr_policy: "step" gamma: 0.5 stepsize: 20 max_iter: 40 display: 10
test_iter: 8 test_interval: 20 snapshot: 20 snapshot_prefix: "PREFIX" solver_mode: CPU random_seed: 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.prototxt").write_text(NET)
    (tmp_path / "solver.prototxt").write_text(SOLVER.replace("PREFIX", str(tmp_path / "q")))
    obs = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", obs=obs, label=(obs[:, 0] > obs[:, 1]).astype(np.float32))
    return tmp_path


def test_train_snapshot_resume_test_and_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver, data = str(folder / "solver.prototxt"), str(folder / "rows.npz")
    assert main(["caffe", "train", "--solver", solver, "--data", data]) == 0
    told = capsys.readouterr().out
    assert "iteration 0  test accuracy" in told
    assert "iteration 30  loss" in told
    assert "lr 0.25" in told
    whole = read_weights(folder / "q_iter_40.caffemodel")
    (folder / "q_iter_40.caffemodel").unlink()
    # Rows are read in order and 20 batches are a whole number of passes, so the second half repeats bit for bit.
    assert (
        main(
            ["caffe", "train", "--solver", solver, "--data", data, "--snapshot", str(folder / "q_iter_20.solverstate")]
        )
        == 0
    )
    again = read_weights(folder / "q_iter_40.caffemodel")
    assert all(np.array_equal(a, b) for name in whole for a, b in zip(whole[name], again[name], strict=True))
    capsys.readouterr()
    net, weights = str(folder / "net.prototxt"), str(folder / "q_iter_40.caffemodel")
    assert main(["caffe", "test", "--model", net, "--weights", weights, "--data", data, "--iterations", "8"]) == 0
    scores = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines())
    assert float(scores["accuracy"]) > 0.9
    assert float(scores["loss"]) < 0.3
    assert main(["caffe", "time", "--model", net, "--weights", weights, "--iterations", "2"]) == 0
    assert "whole net" in capsys.readouterr().out


def test_errors_are_told_in_a_paragraph(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver = str(folder / "solver.prototxt")
    for arguments, message in (
        (["train", "--solver", solver], "inputs ['obs', 'label'] have no data; give --data"),
        (["train", "--solver", solver, "--device", "cpux"], "is not a device"),
        (["train", "--solver", str(folder / "absent.prototxt")], "does not exist"),
        (["trian"], "did you mean 'train'"),
    ):
        assert main(["caffe", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_net_that_a_solver_names_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "solver.prototxt").write_text(
        (folder / "solver.prototxt").read_text().replace("net.prototxt", "/gone/net.prototxt")
    )
    assert main(["caffe", "train", "--solver", str(folder / "solver.prototxt")]) == 2
    assert f"{folder / 'net.prototxt'} exists: give it with --model" in capsys.readouterr().err


def test_generated_data_needs_no_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = Path(__file__).resolve().parents[1] / "fixtures" / "frameworks" / "caffe"
    solver = (files / "solver.prototxt").read_text().replace("/gen/out/q", str(folder / "own"))
    (folder / "own.prototxt").write_text(solver)
    arguments = ["--model", str(files / "train.prototxt"), "--weights", str(files / "q_iter_20.caffemodel")]
    assert main(["caffe", "train", "--solver", str(folder / "own.prototxt"), *arguments]) == 0
    assert "layers fc1, q" in capsys.readouterr().out
    assert (folder / "own_iter_20.caffemodel").exists()
