"""Files for servers and phones do what the policy does in their own runtime, or are not there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lockstep.core.errors import CheckpointError, ConfigError, ExportError, LockstepError, MissingExtraError
from lockstep.interop import export_executorch, export_litert, export_openvino, export_ort, load_exported
from lockstep.interop.check import random_observations
from lockstep.interop.export import edge, openvino_file
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy

EDGE = {"tflite": (export_litert, edge.LITERT), "pte": (export_executorch, edge.EXECUTORCH)}


def need(toolchain: edge.Toolchain) -> None:
    """Skip where the converter's interpreter is not there."""
    try:
        edge.check_installed(toolchain)
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "suffix"), [("mlp-normalised", ".ort"), ("lstm", ".xml")], indirect=["policy"])
def test_server_files(policy: Policy, suffix: str, tmp_path: Path) -> None:
    """A dense policy and one with state; what is written is all there is, and says what it is."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino" if suffix == ".xml" else "onnxruntime")
    export = export_openvino if suffix == ".xml" else export_ort
    path = tmp_path / f"p{suffix}"
    deviations = export(policy, path, distribution=True)
    assert max(d.relative for d in deviations) < 1e-5
    assert {d.name for d in deviations} == set(load_exported(path).outputs)
    assert load_exported(path).metadata["digest"] == policy.digest()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == ([".bin", ".xml"] if suffix == ".xml" else [".ort"])


@pytest.mark.slow
def test_a_pair_of_files_that_differs_is_deleted(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    write = openvino_file.write_onnx

    def write_then_learn(policy: Policy, path: Path, *, distribution: bool) -> None:
        write(policy, path, distribution=distribution)
        assert policy.critic is not None
        policy.critic.biases[-1].data += 0.01

    monkeypatch.setattr(openvino_file, "write_onnx", write_then_learn)
    with pytest.raises(ExportError, match="'value' differs"):
        export_openvino(policy, tmp_path / "p.xml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mlp-normalised", "lstm"], indirect=True)
@pytest.mark.parametrize("kind", EDGE)
def test_edge_files(policy: Policy, kind: str, tmp_path: Path) -> None:
    export, toolchain = EDGE[kind]
    need(toolchain)
    path = tmp_path / f"p.{kind}"
    deviations = export(policy, path, distribution=True)
    assert {d.name for d in deviations} >= {"action", "value", "logprob"}
    assert max(d.relative for d in deviations) < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    exported = load_exported(path)
    assert exported.metadata["digest"] == policy.digest()
    obs = random_observations(policy, 5, np.random.default_rng(1))
    state = exported.initial_state(5)
    inputs = {"observation": obs, **state} | ({"starts": np.ones(5, np.bool_)} if state else {})
    want = Actor(policy, 5, seed=0).act(obs, deterministic=True)
    got = exported(inputs)["action"]
    assert got.dtype == want.env_action.numpy().dtype
    np.testing.assert_allclose(got, want.env_action.numpy(), atol=1e-5)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_exported(path)


@pytest.mark.parametrize("kind", EDGE)
def test_missing_converter_is_named(policy: Policy, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export, toolchain = EDGE[kind]
    monkeypatch.setenv(f"LOCKSTEP_{toolchain.kind.upper()}_PYTHON", str(tmp_path / "no-python"))
    with pytest.raises(MissingExtraError, match=rf"lockstep-rl\[{toolchain.kind}\]"):
        export(policy, tmp_path / f"p.{kind}")
    assert list(tmp_path.iterdir()) == []


REFUSAL = "import sys; print('Note: x', file=sys.stderr); sys.exit('ConverterError: no form for op gather')"
SILENCE = "import time; time.sleep(60)"


def test_what_goes_wrong_in_the_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is told with the converter's words; a process that dies or hangs is an error and is ended."""
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(edge, "WORKER", worker)
    monkeypatch.setattr(edge, "check_installed", lambda toolchain: None)
    monkeypatch.setenv("LOCKSTEP_LITERT_PYTHON", sys.executable)
    worker.write_text(REFUSAL)
    with pytest.raises(ExportError, match="refused the policy: ConverterError: no form for op gather"):
        edge._convert(edge.LITERT, tmp_path / "a.pt2", tmp_path / "b.tflite")
    with pytest.raises(CheckpointError, match="no form for op gather"):
        edge.EdgeProcess(edge.LITERT, tmp_path / "b.tflite")
    worker.write_text(SILENCE)
    with pytest.raises(LockstepError, match="did not answer within"):
        edge.EdgeProcess(edge.LITERT, tmp_path / "b.tflite", deadline_s=0.2)
    with pytest.raises(LockstepError, match="took over"):
        edge._convert(edge.LITERT, tmp_path / "a.pt2", tmp_path / "b.tflite", deadline_s=0.2)


def test_damaged_and_unknown_files(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    for name in ("p.ort", "p.xml"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_exported(tmp_path / name)
    with pytest.raises(ConfigError, match=r"expected .*\.pte"):
        load_exported(tmp_path / "p.bin")
