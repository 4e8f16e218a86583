"""`lockstep export`: what it prints, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.cli.main import main
from lockstep.core.spaces import BoxSpace, DiscreteSpace
from lockstep.interop import load_exported
from lockstep.models.control.folder import save_policy
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import PolicySpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = PolicySpec(obs_space=BoxSpace((3,), "float32"), action_space=DiscreteSpace(2), head="categorical")
    save_policy(Policy(spec), tmp_path / "policy")
    return tmp_path / "policy"


def test_torch_file_is_written_and_described(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder), "--to", "torch"]) == 0
    out = capsys.readouterr().out
    assert "observation float32 [-1, 3]" in out
    assert "action, logprob, value" in out
    assert "max abs 0.0e+00" in out
    assert load_exported(folder / "policy.pt2").outputs == ("action", "logprob", "value")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "onx"], "did you mean 'onnx'"),
        (["--to", "onnx", "--portable"], "--portable belongs to"),
        (["--to", "torch", "--out", "policy.bin"], "must end in .pt2"),
    ],
)
def test_wrong_wishes(folder: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder), *args]) == 2
    assert message in capsys.readouterr().err


def test_source_without_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path)]) == 2
    assert "not a policy folder" in capsys.readouterr().err
