"""Files of the real Keras 2 and 3, read without Keras, against the outputs that it computed; tuned weights go back."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("h5py")

from lockstep.api import policy_from, train
from lockstep.core.errors import ConfigError, FormatError
from lockstep.core.spaces import BoxSpace, DiscreteSpace
from lockstep.interop.hdf5 import longest_text
from lockstep.interop.keras import read_keras, save_keras
from lockstep.interop.readers import format_of, load
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks"
CASES: dict[str, dict[str, object]] = {
    "tf/mlp.keras": {},
    "tf/mlp.h5": {},
    "tf/cnn.keras": {},
    "tf/gru.keras": {},
    "tf/lstm.keras": {},
    "keras2/k2cnn.keras": {},
    "keras2/k2rnn.keras": {},
    "keras2/k2rnn.h5": {},
    "keras2/krl_dqn.h5f": {"config": FILES / "keras2" / "krl_dqn.json"},
    "keras2/krl_ddpg_actor.h5f": {"config": FILES / "keras2" / "krl_ddpg_actor.json"},
    "keras3/a.keras": {},
    "keras3/a.h5": {},
    "keras3/a.weights.h5": {"config": FILES / "keras3" / "a.json"},
    "keras3/b.keras": {},
    "keras3/c.keras": {},
    "keras3/c.h5": {},
}


def _outputs(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    out = module(x)
    return [out] if isinstance(out, torch.Tensor) else list(out)


@pytest.mark.parametrize("name", list(CASES))
def test_equals_keras_at_three_batch_sizes_and_trains_every_weight(name: str, tmp_path: Path) -> None:
    assert format_of(FILES / name) == "keras"
    module = load(FILES / name, **CASES[name])
    stored = arrays(FILES / f"{name.split('.')[0]}_io.npz")
    keys = [key for key in ("y0", "y1") if key in stored]
    x = torch.from_numpy(stored["x"])
    for num in (1, 2, len(x)):
        for got, key in zip(_outputs(module, x[:num]), keys, strict=True):
            assert np.abs(got.detach().numpy() - stored[key][:num]).max() <= 1e-5 * np.abs(stored[key]).max()
    rng = torch.Generator().manual_seed(0)
    sum((y * torch.randn(y.shape, generator=rng)).sum() for y in _outputs(module, x)).backward()
    assert [key for key, parameter in module.named_parameters() if not parameter.grad.any()] == []
    if CASES[name]:
        return
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.02)
    tuned = tmp_path / f"tuned{(FILES / name).suffix}"
    save_keras(module, tuned)
    for got, want in zip(_outputs(read_keras(tuned), x), _outputs(module, x), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_code_weights_alone_and_unknown_layers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"weights and no architecture; give config= the file of model.to_json"):
        load(FILES / "keras3" / "a.weights.h5")
    for word, message in (
        ("Lambda", r"operation Lambda: is code, which is not executed"),
        ("Densest", r"operation Densest: unknown layer 'Densest'; did you mean 'Dense'"),
    ):
        with (
            zipfile.ZipFile(FILES / "keras3" / "a.keras") as source,
            zipfile.ZipFile(tmp_path / "x.keras", "w") as copy,
        ):
            for member in source.namelist():
                content = source.read(member)
                if member == "config.json":
                    config = json.loads(content)
                    config["config"]["layers"][1]["class_name"] = word
                    content = json.dumps(config).encode()
                copy.writestr(member, content)
        with pytest.raises(FormatError, match=message):
            load(tmp_path / "x.keras")
    (tmp_path / "y.h5").write_bytes((FILES / "tf" / "mlp.h5").read_bytes()[:5000])
    with pytest.raises(FormatError, match=r"y\.h5: is no HDF5 file of Keras, or is damaged"):
        load(tmp_path / "y.h5")


def test_a_text_longer_than_the_file_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    content = (FILES / "keras3" / "c.h5").read_bytes()
    stated = longest_text(content, "model_config")
    assert 0 < stated < len(content)
    assert 0 < longest_text(content, "weight_names") < 100
    at = content.index(struct.pack("<I", stated), content.index(b"model_config\0"))
    (tmp_path / "x.h5").write_bytes(content[:at] + struct.pack("<I", 1 << 31) + content[at + 4 :])
    with pytest.raises(FormatError, match=r"x\.h5: its attribute model_config states a text of 2147483648 bytes"):
        load(tmp_path / "x.h5")


def test_weights_of_keras_rl_are_a_policy_with_their_configuration_or_an_activation(tmp_path: Path) -> None:
    path, config = FILES / "keras2" / "krl_dqn.h5f", FILES / "keras2" / "krl_dqn.json"
    stored = arrays(FILES / "keras2" / "krl_dqn_io.npz")
    chain = load(path, activation="relu")
    assert np.abs(chain(torch.from_numpy(stored["x"][:, 0])).detach().numpy() - stored["y0"]).max() <= 1e-5
    for network in (chain, load(path, config=config)):
        policy = policy_from(network, BoxSpace((4,), "float32"), DiscreteSpace(2), outputs="q")
        assert [int(policy.predict(row[0])) for row in stored["x"]] == stored["y0"].argmax(1).tolist()
    # Built again in another process: other names, the same order.
    (tmp_path / "again.json").write_text(config.read_text().replace("dense_", "dense_1"))
    again = load(path, config=tmp_path / "again.json")
    assert np.abs(again(torch.from_numpy(stored["x"])).detach().numpy() - stored["y0"]).max() <= 1e-5
    with pytest.raises(FormatError, match=r"krl_dqn\.h5f: holds weights .*activation='relu' .*'dense_2', 'dense_3'"):
        load(path)
    with pytest.raises(FormatError, match=r"of 3 layers, .*the configuration has 2, \['dense_5', 'dense_6'\]"):
        load(path, config=FILES / "keras2" / "krl_ddpg_actor.json")
    (tmp_path / "wide.json").write_text(config.read_text().replace('"units": 16', '"units": 17'))
    with pytest.raises(FormatError, match=r"'dense_2' has .* 17 units in the configuration and a kernel \[4, 16\]"):
        load(path, config=tmp_path / "wide.json")
    with pytest.raises(FormatError, match=r"krl_dqn\.h5f: is no JSON|its configuration is no JSON"):
        load(path, config=path)
    with pytest.raises(ConfigError, match=r"activation='tanh' is for weights alone"):
        load(FILES / "tf" / "mlp.h5", activation="tanh")
    with pytest.raises(
        FormatError, match=r"layer 'layer_normalization' with arrays .* is no dense layer or convolution"
    ):
        load(FILES / "keras3" / "a.weights.h5", activation="relu")


def test_a_checkpoint_under_the_name_of_a_weights_file() -> None:
    """tf.keras of TensorFlow 2 writes `save_weights("name.h5f")` as a checkpoint, optimiser and all."""
    path, config = FILES / "keras2" / "k2ckpt.h5f", FILES / "keras2" / "k2ckpt.json"
    stored = arrays(FILES / "keras2" / "k2ckpt_io.npz")
    with pytest.raises(FormatError, match=r"does not exist; k2ckpt\.h5f\.index does: .*give .*k2ckpt\.h5f\.index"):
        load(path)
    index = path.with_name("k2ckpt.h5f.index")
    module, x = load(index, config=config), torch.from_numpy(stored["x"])
    for num in (1, 2, 5):
        assert np.abs(module(x[:num]).detach().numpy() - stored["y0"][:num]).max() <= 1e-5
    module(x).pow(2).sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())
    with pytest.raises(FormatError, match=r"of 5 layers, and the configuration has 3"):
        load(index, config=FILES / "keras2" / "krl_dqn.json")
    with pytest.raises(FormatError, match=r"holds no weights of a Keras model"):
        load(FILES / "tf" / "raw_ckpt.index", config=config)


def test_a_heap_that_the_hdf5_library_walks_for_ever_is_refused(tmp_path: Path) -> None:
    content = bytearray((FILES / "keras3" / "c.h5").read_bytes())
    at = content.rindex(b"GCOL") + 16
    content[at : at + 16] = bytes(16)  # free space of no size
    (tmp_path / "x.h5").write_bytes(content)
    with pytest.raises(FormatError, match=rf"x\.h5, byte {at}: an object of 0 bytes in a heap of 4096"):
        load(tmp_path / "x.h5")


TENSORFLOW = os.environ.get("LOCKSTEP_TENSORFLOW_PYTHON", "")
OPENED = """
import sys
import numpy as np, keras
x = np.load(sys.argv[2])
np.save(sys.argv[3], keras.models.load_model(sys.argv[1])(x))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sequential_in_memory_is_a_policy_of_our_trainer_and_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((4,)), dense(16, "tanh"), dense(16, "relu"), dense(2)])
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = model(torch.from_numpy(x)).detach().numpy()
    policy = policy_from(model, BoxSpace((4,), "float32"), DiscreteSpace(2), outputs="logits")
    assert [int(policy.predict(row)) for row in x] == expected.argmax(1).tolist()
    run = train("ppo-cartpole", policy=model, out=tmp_path, total_steps=1024, run__final_episodes=0)
    tuned = run.policy.imported
    assert tuned is not None
    ours = tuned(torch.from_numpy(x)).detach().numpy()
    assert np.abs(ours - expected).max() > 1e-3
    save_keras(tuned, tmp_path / "tuned.keras")
    again = keras.models.load_model(tmp_path / "tuned.keras")(torch.from_numpy(x)).detach().numpy()
    assert np.abs(again - ours).max() <= 1e-6
    if not TENSORFLOW:
        return
    np.save(tmp_path / "x.npy", x)
    clean = {"PATH": os.environ["PATH"], "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": ""}
    command = [TENSORFLOW, "-c", OPENED, *(str(tmp_path / name) for name in ("tuned.keras", "x.npy", "y.npy"))]
    subprocess.run(command, check=True, timeout=300, env=clean, capture_output=True)
    assert np.abs(np.load(tmp_path / "y.npy") - again).max() <= 1e-5


def test_what_is_no_network_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"network is a Linear; expected what lockstep.interop.load returns, a model of"
    ):
        policy_from(torch.nn.Linear(2, 2), BoxSpace((2,), "float32"), DiscreteSpace(2), outputs="logits")
