"""Files of PyTorch, Stable-Baselines3 and CleanRL against the outputs that those computed; none of them is executed."""

from __future__ import annotations

import base64
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.api import policy_from
from lockstep.core.errors import ConfigError, FormatError
from lockstep.core.spaces import BoxSpace, DiscreteSpace
from lockstep.interop.pickles import load_pickle
from lockstep.interop.pytorch import read_state
from lockstep.interop.readers import format_of, load
from lockstep.models.graph import GraphModule
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks"
TOLERANCE = 1e-5
# File -> (format, options).
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "sb3/a2c_acrobot.zip": ("sb3", {}),
    "sb3/dqn_cartpole.zip": ("sb3", {}),
    "sb3/ppo_cartpole.zip": ("sb3", {}),
    "sb3/ppo_image.zip": ("sb3", {}),
    "sb3/ppo_pendulum.zip": ("sb3", {"normalize": FILES / "sb3" / "ppo_pendulum_vecnormalize.pkl"}),
    "sb3/sac_pendulum.zip": ("sb3", {}),
    "sb3/td3_pendulum.zip": ("sb3", {}),
    "cleanrl/c51.cleanrl_model": ("cleanrl", {}),
    "cleanrl/dqn.cleanrl_model": ("cleanrl", {}),
    "cleanrl/ppo.cleanrl_model": ("cleanrl", {}),
    "cleanrl/ppo_continuous_action.cleanrl_model": ("cleanrl", {}),
    "torch/cnn.pt2": ("torch.export", {}),
    "torch/cnn_core.pt2": ("torch.export", {}),
    "torch/mlp.pt2": ("torch.export", {}),
    "torch/mlp.pt": ("torch", {"activation": "tanh"}),
    "torch/mlp.safetensors": ("torch", {"activation": "tanh"}),
}
WORDS = {"logits": "actor", "value": "critic"}
"""Outputs of a state dict have the names of its chains."""


def _stored(name: str) -> dict[str, np.ndarray]:
    return arrays(FILES / f"{name.rsplit('.', 1)[0]}_io.npz")


def _output(module: GraphModule, x: np.ndarray, key: str) -> np.ndarray:
    (port,) = module.graph.inputs
    outputs = module.run({port.name: torch.from_numpy(x.astype(np.float32))})
    got = outputs[key if key in outputs else WORDS[key]].detach()
    # Stable-Baselines3 keeps logits normalised.
    return (torch.log_softmax(got, 1) if key == "logits" else got).numpy()


@pytest.mark.parametrize("name", list(CASES))
def test_equals_the_library_at_three_batch_sizes_and_trains_every_weight(name: str) -> None:
    format, options = CASES[name]
    assert format_of(FILES / name) == format
    module = load(FILES / name, **options)
    stored = _stored(name)
    keys = [key for key in stored if key not in ("x", "a", "log_std")]
    assert keys
    for key in keys:
        want = stored[key]
        want = torch.log_softmax(torch.from_numpy(want), 1).numpy() if key == "logits" else want
        for num in (1, 2, len(want)):
            got = _output(module, stored["x"][:num], key)
            assert got.shape == want[:num].shape
            assert np.abs(got - want[:num]).max() <= TOLERANCE * np.abs(want).max()
    (port,) = module.graph.inputs
    out = module.run({port.name: torch.from_numpy(stored["x"].astype(np.float32))})
    sum((torch.arange(y.numel()).view(y.shape) * y).sum() for y in out.values()).backward()
    for parameter_name, parameter in module.named_parameters():
        assert (parameter.grad != 0).any(), parameter_name


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("sb3/")])
def test_a_stable_baselines3_file_is_a_whole_policy(name: str) -> None:
    _, options = CASES[name]
    stored = _stored(name)
    policy = policy_from(load(FILES / name, **options), critic="value" in stored)
    actions = [policy.predict(row) for row in stored["x"]]
    assert np.abs(np.array(actions, np.float64) - stored["a"]).max() <= 1e-5
    if "log_std" in stored:
        assert np.array_equal(policy.head.log_std.detach().numpy(), stored["log_std"])


def test_a_file_of_weights_needs_to_be_told_what_it_is() -> None:
    with pytest.raises(FormatError, match=r"weights and no architecture; give activation='tanh'.*module=YOUR_MODULE"):
        load(FILES / "torch" / "mlp.pt")
    with pytest.raises(ConfigError, match="the file does not say its obs_space"):
        policy_from(load(FILES / "torch" / "mlp.pt", activation="tanh"))
    assert sorted(read_state(FILES / "torch" / "mlp.pt")) == sorted(read_state(FILES / "torch" / "mlp.safetensors"))


def test_the_callers_module_takes_the_weights(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "a.pth")
    fresh = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    module = load(tmp_path / "a.pth", module=fresh, shapes="obs=3")
    x = torch.randn(6, 3)
    assert torch.equal(module(x), net(x))
    policy = policy_from(module, BoxSpace((3,), "float32"), DiscreteSpace(2), outputs="logits")
    assert torch.equal(policy(x, {}, torch.zeros(6, dtype=torch.bool))[0], net(x))
    with pytest.raises(FormatError, match=r"does not fit Linear"):
        load(tmp_path / "a.pth", module=torch.nn.Linear(3, 2), shapes="obs=3")


class Attack:
    def __reduce__(self) -> object:
        return print, ("executed",)


def test_code_in_a_file_is_named_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(2), "x": Attack()}, tmp_path / "a.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "b.pt")
    with pytest.raises(FormatError, match=r"a\.pt, byte \d+: its pickle names __builtin__.print"):
        load(tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"names torch.nn.modules.linear.Linear.* save the weights alone"):
        load(tmp_path / "b.pt")
    with (
        zipfile.ZipFile(FILES / "sb3" / "ppo_cartpole.zip") as source,
        zipfile.ZipFile(tmp_path / "c.zip", "w") as copy,
    ):
        for member in source.namelist():
            content = source.read(member)
            if member == "data":
                evil = b'":serialized:": "' + base64.b64encode(pickle.dumps(Attack())) + b'"'
                head, _, tail = content.partition(b'"observation_space": {')
                begin, end = tail.index(b'":serialized:"'), tail.index(b'",', tail.index(b'":serialized:"'))
                content = head + b'"observation_space": {' + tail[:begin] + evil + tail[end + 1 :]
            copy.writestr(member, content)
    with pytest.raises(FormatError, match=r"c\.zip, byte \d+: its pickle names builtins.print"):
        load(tmp_path / "c.zip")
    assert "executed" not in capsys.readouterr().out


def test_pickles_of_numbers_are_read_and_lies_about_them_refused() -> None:
    value = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.float32(2.5), "c": [np.array(3, ">i4"), (1, "x")]}
    for protocol in range(6):
        got = load_pickle(pickle.dumps(value, protocol), "file")
        assert np.array_equal(got["a"], value["a"])
        assert (got["b"], int(got["c"][0]), got["c"][1]) == (2.5, 3, (1, "x"))
    lie = pickle.dumps(np.zeros(3), 4).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85")
    with pytest.raises(FormatError, match="an array of shape"):
        load_pickle(lie, "file")
    with pytest.raises(FormatError, match="an array of the type 'O8'"):
        load_pickle(pickle.dumps(np.array([None]), 4), "file")
    with pytest.raises(FormatError, match="file, byte 1: is a damaged pickle"):
        load_pickle(b"\x80", "file")


def test_a_tensor_reaches_no_further_than_its_numbers(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(4, 3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as copy:
        for member in source.namelist():
            content = source.read(member)
            copy.writestr(member, content.replace(b"K\x04K\x03", b"K\x05K\x03") if member.endswith("pkl") else content)
    with pytest.raises(FormatError, match=r"shape \[5, 3\] reaches beyond its 12 numbers"):
        read_state(tmp_path / "b.pt")
