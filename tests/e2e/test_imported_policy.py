"""A network of another framework becomes a policy: trained, saved, loaded, exported, served, written back."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.api import load, policy_from, train
from lockstep.core.errors import ConfigError, FormatError
from lockstep.core.spaces import BoxSpace, DiscreteSpace
from lockstep.interop import load as load_network
from lockstep.interop.exported import load_exported
from lockstep.interop.onnx_file import export_onnx
from lockstep.models.graph import save_graph
from tests.interop.onnx.build import mlp

pytestmark = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="extra: onnx")
OBS = BoxSpace((4,), "float32")


def _run(recipe: str, file: Path, out: Path, **overrides: object) -> object:
    return train(recipe, out=out, network__imported=str(file), run__tensorboard=False, **overrides)


@pytest.mark.slow
def test_ppo_trains_every_weight_of_an_onnx_file_and_the_folder_stands_alone(tmp_path: Path) -> None:
    file = mlp(tmp_path / "policy.onnx", (4, 32, 32, 2), softmax=True)
    before = {name: tensor.clone() for name, tensor in load_network(file).state_dict().items()}
    run = _run("ppo-cartpole", file, tmp_path, run__total_steps=5120, run__final_episodes=5, run__eval_every=0)
    assert run.result.evaluation is not None
    assert run.result.evaluation.mean > 40.0
    file.unlink()
    (tmp_path / "moved").symlink_to(run.path)
    policy = load(tmp_path / "moved")
    assert policy.imported is not None
    after = policy.imported.state_dict()
    assert set(after) == set(before)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    obs = torch.randn(5, 4)
    step = policy.act(obs, {}, torch.zeros(5, dtype=torch.bool), torch.zeros(5, 2), deterministic=True)
    deviations = export_onnx(policy, tmp_path / "out.onnx")
    assert {d.name for d in deviations} == {"action", "logprob", "value"}
    assert np.array_equal(load_exported(tmp_path / "out.onnx")({"observation": obs.numpy()})["action"], step.env_action)


def test_tuned_weights_go_back_into_the_original_graph(tmp_path: Path) -> None:
    import onnxruntime

    from lockstep.interop.onnx import save_onnx

    file = mlp(tmp_path / "policy.onnx", (4, 16, 2), softmax=True, value=True)
    run = _run("ppo-cartpole", file, tmp_path, run__total_steps=512, run__final_episodes=0, run__eval_every=0)
    policy = load(run.path)
    save_onnx(policy.imported, tmp_path / "tuned.onnx")
    obs = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "tuned.onnx"))
    probabilities, value = session.run(["out", "value"], {"obs": obs})
    params, own_value, _ = policy(torch.from_numpy(obs), {}, torch.zeros(6, dtype=torch.bool))
    assert np.allclose(probabilities, torch.softmax(params.detach(), 1), atol=1e-6)
    assert np.allclose(value[:, 0], own_value.detach(), atol=1e-6)


@pytest.mark.slow
def test_dqn_trains_one_and_resumes_without_the_file(tmp_path: Path) -> None:
    file = mlp(tmp_path / "q.onnx", (4, 24, 2))
    run = _run("dqn-cartpole", file, tmp_path, run__total_steps=1536, run__final_episodes=1)
    assert not torch.equal(load(run.path).imported.w0, load_network(file).w0)
    assert json.loads((run.path / "config.json").read_text())["config"]["network"]["imported"] == str(file)
    assert (run.path / "imported" / "model.safetensors").is_file()


def test_as_encoder_layers_of_ours_come_on_top(tmp_path: Path) -> None:
    file = mlp(tmp_path / "trunk.onnx", (4, 16, 9))
    run = _run("ppo-cartpole", file, tmp_path, run__total_steps=512, run__final_episodes=0, run__eval_every=0)
    spec = load(run.path).spec
    assert spec.imported is not None
    assert (spec.imported.role, spec.imported.size) == ("encoder", 9)


def test_policy_from_a_module_says_what_does_not_fit(tmp_path: Path) -> None:
    network = load_network(mlp(tmp_path / "net.onnx", (4, 8, 3)))
    policy = policy_from(network, OBS, DiscreteSpace(3), outputs="logits")
    obs = torch.randn(2, 4)
    assert torch.equal(policy(obs, {}, torch.zeros(2, dtype=torch.bool))[0], network(obs))
    greedy = policy_from(network, OBS, DiscreteSpace(3), outputs="q")
    assert greedy.predict(obs[0].numpy()) == int(network(obs)[0].argmax())
    with pytest.raises(ConfigError, match="no output of the imported network has 5 columns"):
        policy_from(network, OBS, DiscreteSpace(5), outputs="logits")
    with pytest.raises(ConfigError, match="does not take these observations: operation MatMul"):
        policy_from(network, BoxSpace((7,), "float32"), DiscreteSpace(3), outputs="logits")
    with pytest.raises(ConfigError, match="outputs"):
        policy_from(network, OBS, DiscreteSpace(3), outputs="logits", output="nothing")


def test_a_missing_or_damaged_file_is_told_before_a_run_begins(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        _run("ppo-cartpole", tmp_path / "none.onnx", tmp_path / "runs")
    (tmp_path / "cut.onnx").write_bytes(mlp(tmp_path / "net.onnx", (4, 8, 2)).read_bytes()[:100])
    with pytest.raises(FormatError, match=r"cut\.onnx"):
        _run("ppo-cartpole", tmp_path / "cut.onnx", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_lockstep_import_trains_too(tmp_path: Path) -> None:
    save_graph(load_network(mlp(tmp_path / "net.onnx", (4, 8, 2))), tmp_path / "net")
    run = _run("ppo-cartpole", tmp_path / "net", tmp_path, run__total_steps=256, run__final_episodes=0)
    assert load(run.path).imported.original["model.onnx"]
