"""Checkpoints of the real TensorFlow and a policy of TF-Agents, read without TensorFlow."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.api import policy_from
from lockstep.core.errors import FormatError, MissingExtraError
from lockstep.core.spaces import BoxSpace, DiscreteSpace
from lockstep.interop.readers import format_of, load
from lockstep.interop.tensorflow import read_checkpoint
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks"
ENDING = "/.ATTRIBUTES/VARIABLE_VALUE"


def test_a_checkpoint_of_tf1_gives_what_its_graph_computed() -> None:
    w = read_checkpoint(FILES / "tf" / "tf1_model.ckpt.index")
    stored = arrays(FILES / "tf" / "tf1_io.npz")
    assert {name: tuple(t.shape) for name, t in w.items()} == {"pi/b": (32,), "pi/w": (11, 32), "pi/w2": (32, 3)}
    hidden = torch.tanh(torch.from_numpy(stored["x"]) @ w["pi/w"] + w["pi/b"])
    assert np.abs((hidden @ w["pi/w2"]).numpy() - stored["y0"]).max() <= 1e-6


def test_a_checkpoint_of_tf2_gives_what_its_model_computed() -> None:
    w = {name.removesuffix(ENDING)[6:]: t for name, t in read_checkpoint(FILES / "tf" / "raw_ckpt").items()}
    stored = arrays(FILES / "tf" / "raw_io.npz")
    x = torch.from_numpy(stored["x"]).permute(0, 3, 1, 2)
    # Padding SAME: 84 / 4 = 21 needs 4 more, 21 / 2 = 11 needs 3 more.
    for kernel, bias, stride, pads in (("c1", "b1", 4, (2, 2, 2, 2)), ("c2", "b2", 2, (1, 2, 1, 2))):
        x = torch.conv2d(torch.nn.functional.pad(x, pads), w[kernel].permute(3, 2, 0, 1), w[bias], stride=stride).relu()
    x = (x.permute(0, 2, 3, 1).flatten(1) @ w["w"] + w["bw"]).relu()
    for head, key in (("p", "y0"), ("v", "y1")):
        assert np.abs((x @ w[head]).numpy() - stored[key]).max() <= 1e-5 * np.abs(stored[key]).max()


def test_a_policy_of_tf_agents_is_read_and_trains() -> None:
    path = FILES / "keras2" / "dqn_policy"
    stored = arrays(FILES / "keras2" / "dqn_io.npz")
    assert format_of(path) == "tf"
    module, x = load(path), torch.from_numpy(stored["x"])
    for num in (1, 2, 5):
        assert np.abs(module(x[:num]).detach().numpy() - stored["q"][:num]).max() <= 1e-5
    module(x)[:, 0].sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())
    policy = policy_from(module, BoxSpace((4,), "float32"), DiscreteSpace(2), outputs="q")
    assert [int(policy.predict(row)) for row in stored["x"]] == stored["a"].tolist()


def test_damage_and_missing_parts_are_named(tmp_path: Path) -> None:
    index = (FILES / "tf" / "raw_ckpt.index").read_bytes()
    (tmp_path / "a.index").write_bytes(index)
    with pytest.raises(FormatError, match=r"a\.data-00000-of-00001: holds tensor .* cannot be read"):
        read_checkpoint(tmp_path / "a")
    (tmp_path / "a.data-00000-of-00001").write_bytes(b"\0" * 1000)
    with pytest.raises(FormatError, match=r"a\.data-00000-of-00001, byte \d+: tensor .* truncated"):
        read_checkpoint(tmp_path / "a")
    (tmp_path / "a.index").write_bytes(index[:-1])
    with pytest.raises(FormatError, match=r"a\.index: is no table of a TensorFlow checkpoint"):
        read_checkpoint(tmp_path / "a")
    with pytest.raises(FormatError, match=r"holds variables and no graph .*activation="):
        load(FILES / "tf" / "raw_ckpt.index")


def test_a_graph_asks_for_an_interpreter_with_the_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCKSTEP_TENSORFLOW_PYTHON", raising=False)
    with pytest.raises(MissingExtraError, match=r"tf2onnx is needed .*python= or LOCKSTEP_TENSORFLOW_PYTHON"):
        load(FILES / "tf" / "tf1_frozen.pb")
    with pytest.raises(MissingExtraError, match=r"/nowhere for tensorflow does not exist"):
        load(FILES / "tf" / "tf1_frozen.pb", python="/nowhere")


@pytest.mark.slow
@pytest.mark.skipif("LOCKSTEP_TENSORFLOW_PYTHON" not in os.environ, reason="no interpreter with tf2onnx is named")
def test_a_frozen_graph_through_its_converter() -> None:
    stored = arrays(FILES / "tf" / "tf1_io.npz")
    module = load(FILES / "tf" / "tf1_frozen.pb")
    assert np.abs(module(torch.from_numpy(stored["x"])).detach().numpy() - stored["y0"]).max() <= 1e-5
