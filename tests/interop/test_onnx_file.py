"""An ONNX file does what the policy does, or is not there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lockstep.core import extras
from lockstep.core.errors import CheckpointError, ConfigError, ExportError, MissingExtraError
from lockstep.interop import export_onnx, load_exported, onnx_file
from lockstep.interop.check import compare, random_observations, tolerance_of
from lockstep.interop.exported import onnx_session
from lockstep.interop.program import PolicyProgram
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy

pytestmark = pytest.mark.skipif(None in map(find_spec, ("onnxscript", "onnxruntime")), reason="extra: onnx")

# The others are exported through ONNX to ONNX Runtime's and OpenVINO's files, and in `test_odd_shapes.py`.
KINDS = ["multi", "squashed", "q-rainbow", "stack", "impala", "gru", "masked", "dict"]


@pytest.mark.slow
def test_dense_policy_has_one_input_and_its_action_first(policy: Policy, tmp_path: Path) -> None:
    deviations = {d.name: d for d in export_onnx(policy, tmp_path / "p.onnx")}
    assert set(deviations) == {"action", "logprob", "value"}
    assert all(d.num_rows == 180 and d.relative < 1e-4 for d in deviations.values())
    assert [path.name for path in tmp_path.iterdir()] == ["p.onnx"]
    session = onnx_session(tmp_path / "p.onnx")
    assert [(i.name, i.type) for i in session.get_inputs()] == [("observation", "tensor(float)")]
    assert [o.name for o in session.get_outputs()] == ["action", "logprob", "value"]
    exported = load_exported(tmp_path / "p.onnx")
    assert exported.metadata["digest"] == policy.digest()
    assert exported.metadata["version"] == 7
    obs = random_observations(policy, 50, np.random.default_rng(5))
    want = Actor(policy, 50, seed=0).act(obs, deterministic=True)
    got = exported({"observation": obs})
    assert np.array_equal(got["action"], want.env_action.numpy())
    assert np.allclose(got["value"], want.value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", KINDS, indirect=True)
def test_every_kind_of_policy(policy: Policy, tmp_path: Path) -> None:
    """The comparison is in `export_onnx`; here its reach: every output of the program has been compared."""
    deviations = export_onnx(policy, tmp_path / "p.onnx", distribution=True)
    exported = load_exported(tmp_path / "p.onnx")
    assert {d.name for d in deviations} == set(exported.outputs)
    assert exported.outputs[0] == "action"


@pytest.mark.slow
def test_a_file_that_differs_is_deleted(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is against what stands in the file: a policy that changes after it was traced does not match."""
    write = onnx_file._write

    def write_then_learn(program: PolicyProgram, metadata: str, path: Path) -> None:
        write(program, metadata, path)
        assert policy.critic is not None
        policy.critic.biases[-1].data += 0.01

    monkeypatch.setattr(onnx_file, "_write", write_then_learn)
    with pytest.raises(ExportError, match=r"'value' differs.*observation"):
        export_onnx(policy, tmp_path / "p.onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_named(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(extras.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"lockstep-rl\[onnx\]"):
        export_onnx(policy, tmp_path / "p.onnx")


def test_damage_and_paths(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "p.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_exported(tmp_path / "p.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        export_onnx(policy, tmp_path / "file" / "p.onnx")


class Echo:
    """The policy itself, with one output changed."""

    def __init__(self, policy: Policy, name: str, change: float) -> None:
        self.policy, self.name, self.change = policy, name, change

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        num = len(inputs["observation"])
        step = Actor(self.policy, num, seed=0).act(inputs["observation"], deterministic=True)
        assert step.value is not None
        out = {"action": step.env_action, "logprob": step.logprob, "value": step.value}
        arrays = {name: x.numpy().copy() for name, x in out.items()}
        arrays[self.name] = (arrays[self.name] + self.change).astype(arrays[self.name].dtype)
        return arrays


@pytest.mark.parametrize("policy", ["mlp-normalised", "gaussian"], indirect=True)
@pytest.mark.parametrize("name", ["action", "logprob", "value"])
def test_comparison_finds_every_output(policy: Policy, name: str) -> None:
    change = 1.0 if policy.spec.head == "categorical" and name == "action" else 1e-3
    assert all(d.absolute == 0.0 for d in compare(policy, Echo(policy, name, 0.0), tolerance=0.0))
    with pytest.raises(ExportError, match=f"'{name}' differs"):
        compare(policy, Echo(policy, name, change), tolerance=tolerance_of(policy))
    with pytest.raises(ExportError, match=f"'{name}' differs"):
        compare(policy, Echo(policy, name, np.nan if change < 1 else 1.0), tolerance=tolerance_of(policy))


def test_choices_may_differ_only_where_they_tie(policy: Policy) -> None:
    """With equal weights for all choices every row is a tie, and any choice is right."""
    for tensor in (*policy.actor.weights, *policy.actor.biases):
        tensor.data.zero_()
    other = compare(policy, Echo(policy, "action", 1.0), tolerance=1e-4)
    assert {d.name: d.num_ties for d in other}["action"] == 180
