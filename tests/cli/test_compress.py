"""`lockstep compress` and `lockstep bench export`: what is measured is what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.cli.main import main
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.interop import load_exported
from lockstep.models.control.folder import load_policy, save_policy
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.runs.config_json import config_to_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CartPole policy that knows its environment."""
    env = make_env(EnvConfig(), seed=0)
    env.close()
    network = NetworkConfig(hidden_sizes=(32, 32))
    spec = PolicySpec(obs_space=env.obs_space, action_space=env.action_space, head="categorical", network=network)
    policy = Policy(spec, seed=2)
    policy.actor.weights[-1].data *= 100
    save_policy(policy, tmp_path / "policy", environment=config_to_json(EnvConfig()))
    return tmp_path / "policy"


@pytest.mark.slow
def test_every_method_is_written_and_measured(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    words = ["--method", "prune-weights", "prune-units", "int8-dynamic", "int8-static", "distill"]
    sizes = ["--episodes", "3", "--observations", "100", "--tune-steps", "1024", "--hidden-sizes", "8"]
    assert main(["compress", str(folder), *words, *sizes, "--json", str(tmp_path / "r.json")]) == 0
    table = capsys.readouterr().out
    assert "return (95% CI)" in table
    figures = {f["name"]: f for f in json.loads((tmp_path / "r.json").read_text())["figures"]}
    assert list(figures) == ["original", *words[1:]]
    original = figures["original"]
    assert original["same_actions"] == 1.0
    for name, figure in figures.items():
        path = folder / "compressed" / name / "policy.onnx"
        assert path.stat().st_size == figure["bytes"]
        assert load_exported(path).metadata["outputs"][0] == "action"
        assert figure["latency_us"] > 0
        assert figure["return_low"] <= figure["return_mean"] <= figure["return_high"]
    weights = figures["prune-weights"]
    assert weights["parameters"] == original["parameters"]
    assert weights["nonzero"] < 0.6 * original["nonzero"]
    assert weights["zipped"] < original["zipped"]
    for name, hidden in (("prune-units", (16, 16)), ("distill", (8,))):
        assert load_policy(folder / "compressed" / name).spec.network.hidden_sizes == hidden
        assert figures[name]["parameters"] < 0.5 * original["parameters"]
        assert figures[name]["bytes"] < original["bytes"]
    for name in ("int8-dynamic", "int8-static"):
        assert figures[name]["same_actions"] > 0.8
        assert figures[name]["bytes"] < original["bytes"]


@pytest.mark.slow
def test_bench_export_prints_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    path = tmp_path / "r.json"
    args = [str(folder), "--to", "onnx", "torch", "--observations", "200", "--json", str(path)]
    assert main(["bench", "export", *args]) == 0
    assert "different actions" in capsys.readouterr().out
    targets = {t["target"]: t for t in json.loads(path.read_text())["targets"]}
    assert list(targets) == ["eager", "onnx", "torch"]
    assert all(t["different_actions"] == 0 and t["latency_us"] > 0 and t["kilobytes"] > 0 for t in targets.values())
    assert 0 < targets["onnx"]["max_error"] < 1e-5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compress", "POLICY", "--method", "int8"], "unknown method 'int8'"),
        (["compress", "POLICY", "--episodes", "1"], "at least 2"),
        (["compress", "POLICY", "--method", "distill", "--tune-steps", "-1"], "tune_steps at least 0"),
        (["bench", "export", "POLICY", "--to", "onx"], "did you mean 'onnx'"),
        (["export", "POLICY", "--runtime", "x.tgz"], "--runtime belongs to"),
    ],
)
def test_wrong_wishes(folder: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder) if arg == "POLICY" else arg for arg in args]) == 2
    assert message in capsys.readouterr().err
