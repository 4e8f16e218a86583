"""Policies of the real TF-Agents (PPO, REINFORCE, SAC, TD3, DQN on images), read without TensorFlow, against its outputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.api import policy_from
from lockstep.core.errors import FormatError
from lockstep.core.spaces import BoxSpace, DiscreteSpace
from lockstep.interop.readers import load
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks" / "tfagents"
# Folder -> (options, head, outputs).
CASES: dict[str, tuple[dict[str, str], str, list[str]]] = {
    "ppo_discrete": ({"activation": "tanh"}, "categorical", ["logits", "value"]),
    "reinforce": ({}, "gaussian", ["mean"]),
    "sac": ({}, "squashed", ["parameters", "action"]),
    "sac_old": ({}, "squashed", ["parameters", "action"]),
    "td3": ({}, "deterministic", ["action"]),
    "q_image": ({}, "q", ["q"]),
}


@pytest.mark.parametrize("name", list(CASES))
def test_equals_tf_agents_and_trains_every_weight(name: str) -> None:
    options, head, outputs = CASES[name]
    module, stored = load(FILES / name, **options), arrays(FILES / f"{name}_io.npz")
    assert module.graph.about.head == head
    assert [port.name for port in module.graph.outputs] == outputs
    x = torch.from_numpy(stored["x"])
    for num in (1, 2, 5):
        for got, key in zip(module.outputs([x[:num]]), ("y0", "y1")[: len(outputs)], strict=True):
            assert np.abs(got.detach().numpy() - stored[key][:num]).max() <= 1e-5 * np.abs(stored[key]).max()
    rng = torch.Generator().manual_seed(0)
    sum((y * torch.randn(y.shape, generator=rng)).sum() for y in module.outputs([x])).backward()
    assert [key for key, parameter in module.named_parameters() if not parameter.grad.any()] == []
    # The file says spaces and distribution; its own greedy actions, in the units of its environment.
    policy = policy_from(module)
    assert np.abs(np.stack([policy.predict(row) for row in stored["x"]]) - stored["a"]).max() <= 1e-5
    if name == "reinforce":
        # softplus of the bias that the projection network keeps.
        assert policy.head.log_std.detach().numpy() == pytest.approx(np.log(stored["std"][0]), abs=1e-6)


def test_what_a_file_does_not_tell_is_left_out_or_named(tmp_path: Path) -> None:
    module = load(FILES / "ppo_discrete")
    assert [port.name for port in module.graph.outputs] == ["logits"]
    assert "no stored function runs ValueNetwork" in module.graph.about.notes["value"]
    assert module.graph.about.action_space == {"kind": "discrete", "n": 3, "start": 0}
    policy = policy_from(load(FILES / "td3"))
    assert policy.spec.action_space == BoxSpace((2,), "float32", (-1.0, -2.0), (1.0, 3.0))
    assert policy.spec.obs_space == BoxSpace((4,), "float32")
    assert isinstance(policy_from(load(FILES / "q_image")).spec.action_space, DiscreteSpace)
    copy = shutil.copytree(FILES / "td3", tmp_path / "td3")
    graph = (copy / "saved_model.pb").read_bytes()
    (copy / "saved_model.pb").write_bytes(graph.replace(b"ActorNetwork/action/Tanh", b"ActorNetwork/flatten_Tan"))
    with pytest.raises(
        FormatError, match=r"td3: has the operation Tanh \(ActorNetwork/flatten_Tan\) beside its layers"
    ):
        load(copy)
    (copy / "saved_model.pb").write_bytes(
        graph.replace(b"dense0/Relu", b"dense0/Rela").replace(b"\x04Relu", b"\x04Erfc")
    )
    with pytest.raises(FormatError, match=r"has the operations \['Erfc'\] in ActorNetwork/input_mlp/dense0; known"):
        load(copy)
    (copy / "saved_model.pb").write_bytes(graph[:-100])
    with pytest.raises(FormatError, match=r"saved_model\.pb: byte \d+: .*truncated"):
        load(copy)
    (copy / "saved_model.pb").write_bytes(graph)
    specs = (copy / "policy_specs.pbtxt").read_text()
    (copy / "policy_specs.pbtxt").write_text(specs.replace("DT_FLOAT", "DT_HALF"))
    with pytest.raises(FormatError, match=r"policy_specs\.pbtxt: line \d+: .*element type 'DT_HALF' is not read"):
        load(copy)
