"""A loaded torch.export program gives the policy's bits; a portable one runs without Lockstep."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.core.errors import CheckpointError, ConfigError, InputError
from lockstep.interop import export_torch, load_exported
from lockstep.interop.check import random_observations
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy

FAST = ["mlp-normalised", "multi", "gaussian", "squashed", "q-rainbow", "stack"]
SLOW = ["mlp-discrete", "mlp-start", "deterministic", "q", "image", "impala", "lstm", "gru", "masked", "dict"]
REST = ["multi", "q-rainbow", "stack", "impala", "gru", "masked", "dict"]
ALL = [*FAST, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ALL, indirect=True)
def test_exact_program_gives_the_policys_bits(policy: Policy, tmp_path: Path) -> None:
    """Batches of 1, 2 and 7, five steps with resets; the program's state is its own."""
    export_torch(policy, tmp_path / "p.pt2", distribution=True)
    exported = load_exported(tmp_path / "p.pt2")
    rng = np.random.default_rng(2)
    for num in (1, 2, 7):
        actor = Actor(policy, num, seed=0)
        state = exported.initial_state(num)
        for _ in range(5):
            obs = random_observations(policy, num, rng)
            inputs = {**(obs if isinstance(obs, dict) else {"observation": obs}), **state}
            if state:
                inputs["starts"] = actor.starts.numpy()
            got = exported(inputs)
            want = actor.act(obs, deterministic=True)
            assert torch.equal(torch.from_numpy(got["action"]), want.env_action)
            assert ("logprob" in got) == (policy.spec.head not in ("q", "deterministic"))
            assert ("value" in got) == policy.spec.critic
            if "logprob" in got:
                assert torch.equal(torch.from_numpy(got["logprob"]), want.logprob)
            if want.value is not None:
                assert torch.equal(torch.from_numpy(got["value"]), want.value)
            state = exported.next_state(got)
            for name, array in state.items():
                assert torch.equal(torch.from_numpy(array), actor.state[name.removeprefix("state.")])
            actor.advance(rng.random(num) < 0.4)


STRANGER = """
import json, sys
import torch
program = torch.export.load(sys.argv[1], extra_files=(extra := {"lockstep": ""})).module()
metadata = json.loads(extra["lockstep"])
obs = torch.tensor(json.loads(sys.argv[2]))
inputs = {"observation": obs}
if any(port["name"] == "starts" for port in metadata["inputs"]):
    inputs["starts"] = torch.ones(len(obs), dtype=torch.bool)
for port in metadata["inputs"]:
    if port["name"].startswith("state."):
        inputs[port["name"]] = torch.zeros(len(obs), *port["shape"])
out = program(inputs)
assert not [name for name in sys.modules if name.split(".")[0] == "lockstep"]
print(json.dumps({name: x.tolist() for name, x in out.items()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["gaussian", "lstm"], indirect=True)
def test_portable_program_runs_without_lockstep(policy: Policy, tmp_path: Path) -> None:
    deviations = export_torch(policy, tmp_path / "p.pt2", portable=True)
    assert max(deviation.relative for deviation in deviations) < 1e-5
    obs = random_observations(policy, 4, np.random.default_rng(3))
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "p.pt2"), json.dumps(obs.tolist())]
    # A folder of its own: the working directory must not lend it the package.
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    want = Actor(policy, 4, seed=0).act(obs, deterministic=True)
    assert np.allclose(got["action"], want.env_action, rtol=1e-5, atol=1e-5)
    assert np.allclose(got["logprob"], want.logprob, rtol=1e-5, atol=1e-5)
    assert np.allclose(got["value"], want.value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "policy", ["squashed", *[pytest.param(n, marks=pytest.mark.slow) for n in REST]], indirect=True
)
def test_portable_programs_agree(policy: Policy, tmp_path: Path) -> None:
    """`export_torch` compares; here that every kind of policy passes."""
    deviations = {d.name: d for d in export_torch(policy, tmp_path / "p.pt2", portable=True)}
    assert deviations["action"].num_rows == 180


def test_file_says_what_it_is(policy: Policy, tmp_path: Path) -> None:
    export_torch(policy, tmp_path / "p.pt2")
    exported = load_exported(tmp_path / "p.pt2")
    assert exported.metadata["digest"] == policy.digest()
    assert exported.metadata["version"] == 7
    assert exported.metadata["spec"] == json.loads(json.dumps(policy.spec.to_json()))
    with pytest.raises(InputError, match="observation"):
        exported({"obs": np.zeros((1, 5), np.float32)})
    with pytest.raises(InputError, match=r"expected \(1, 5\)"):
        exported({"observation": np.zeros((1, 4), np.float32)})


def test_paths_that_cannot_be_used(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        export_torch(policy, tmp_path / "file" / "p.pt2")
    with pytest.raises(ConfigError, match=r"must end in \.pt2"):
        export_torch(policy, tmp_path / "p.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_exported(tmp_path / "p.pt2")
    with pytest.raises(ConfigError, match="expected"):
        load_exported(tmp_path / "p.bin")
    (tmp_path / "p.pt2").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_exported(tmp_path / "p.pt2")
    export_torch(policy, tmp_path / "p.pt2")
    content = (tmp_path / "p.pt2").read_bytes()
    for size in (0, 100, len(content) - 30):
        (tmp_path / "p.pt2").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_exported(tmp_path / "p.pt2")
