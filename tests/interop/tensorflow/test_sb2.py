"""Archives of Stable-Baselines 2 in its documented format, judged by a forward pass in NumPy written here from its sources'
formulas. Stable-Baselines 2 needs TensorFlow 1 and Python 3.7, which cannot be installed beside this; LOCKSTEP_SB2_AGENTS names
a folder of real files (those of rl-baselines-zoo), for the last test."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.api import evaluate, policy_from
from lockstep.core.errors import FormatError
from lockstep.interop.readers import format_of, load

AGENTS = os.environ.get("LOCKSTEP_SB2_AGENTS", "")


class Box:
    """Stands for gym.spaces.box.Box as Gym 0.15 pickled it."""

    def __init__(self, low: float, high: float, shape: tuple[int, ...], dtype: str = "float32") -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.low, self.high = np.full(shape, low, dtype), np.full(shape, high, dtype)


class Discrete:
    def __init__(self, n: int) -> None:
        self.n, self.shape, self.dtype = n, (), np.dtype("int64")


Box.__module__, Discrete.__module__ = "gym.spaces.box", "gym.spaces.discrete"


def _pickled(value: Any, protocol: int = 4) -> bytes:
    """A pickle that names Gym's classes, which need not be installed."""

    class Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
        def save_global(self, obj: Any, name: Any = None) -> None:
            if obj in (Box, Discrete):
                self.write(b"c" + f"{obj.__module__}\n{obj.__name__}\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    stream = io.BytesIO()
    Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def _write(path: Path, tensors: dict[str, np.ndarray], obs: Any, action: Any, kwargs: dict[str, Any]) -> Path:
    if path.suffix == ".pkl":
        data = {"observation_space": obs, "action_space": action, "policy_kwargs": kwargs}
        path.write_bytes(_pickled((data, dict(tensors))))
        return path
    spaces = {
        key: {":type:": "<class>", ":serialized:": base64.b64encode(_pickled(space)).decode()}
        for key, space in (("observation_space", obs), ("action_space", action))
    }
    arrays = io.BytesIO()
    np.savez(arrays, **tensors)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", json.dumps({**spaces, "policy_kwargs": kwargs, "gamma": 0.99}))
        archive.writestr("parameters", arrays.getvalue())
        archive.writestr("parameter_list", json.dumps(list(tensors)))
    return path


def _tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"{name}:0": (0.3 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def _linear(sizes: dict[str, tuple[int, int]], kernel: str = "w", bias: str = "b") -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for scope, (k, n) in sizes.items():
        found |= {f"{scope}/{kernel}": (k, n), f"{scope}/{bias}": (n,)}
    return found


def _got(path: Path, x: np.ndarray) -> list[np.ndarray]:
    module = load(path)
    out = module(torch.from_numpy(x))
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    rng = torch.Generator().manual_seed(0)
    sum((y * torch.randn(y.shape, generator=rng)).sum() for y in outs).backward()
    assert [key for key, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []
    return [y.detach().numpy() for y in outs]


def _near(got: np.ndarray, expected: np.ndarray) -> bool:
    return got.shape == expected.shape and bool(np.abs(got - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1.0))


ACTOR_CRITIC = {
    "model/pi_fc0": (4, 6),
    "model/vf_fc0": (4, 6),
    "model/pi_fc1": (6, 5),
    "model/vf_fc1": (6, 5),
    "model/vf": (5, 1),
    "model/pi": (5, 3),
    "model/q": (5, 3),
}


@pytest.mark.parametrize("suffix", [".zip", ".pkl"])
@pytest.mark.parametrize("continuous", [False, True])
def test_a_dense_policy_with_a_value(suffix: str, continuous: bool, tmp_path: Path) -> None:
    t = _tensors({**_linear(ACTOR_CRITIC), **({"model/pi/logstd": (1, 3)} if continuous else {})})
    space = Box(-1.0, 1.0, (3,)) if continuous else Discrete(3)
    path = _write(tmp_path / f"a{suffix}", t, Box(-np.inf, np.inf, (4,)), space, {})
    assert format_of(path) == "sb2"
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    pi, vf = x, x
    for i in range(2):
        pi = np.tanh(pi @ t[f"model/pi_fc{i}/w:0"] + t[f"model/pi_fc{i}/b:0"])
        vf = np.tanh(vf @ t[f"model/vf_fc{i}/w:0"] + t[f"model/vf_fc{i}/b:0"])
    logits, value = _got(path, x)
    assert _near(logits, pi @ t["model/pi/w:0"] + t["model/pi/b:0"])
    assert _near(value, vf @ t["model/vf/w:0"] + t["model/vf/b:0"])
    module = load(path)
    assert module.graph.about.head == ("gaussian" if continuous else "categorical")
    if continuous:
        assert np.allclose(module.graph.about.log_std, t["model/pi/logstd:0"][0])
    policy = policy_from(module)
    if not continuous:
        assert [int(policy.predict(row)) for row in x] == logits.argmax(1).tolist()


def test_variables_without_names_follow_the_order_of_creation(tmp_path: Path) -> None:
    t = _tensors(_linear(ACTOR_CRITIC))
    obs, action = Box(-1, 1, (4,)), Discrete(3)
    data = {"observation_space": obs, "action_space": action}
    (tmp_path / "old.pkl").write_bytes(_pickled((data, list(t.values()))))
    x = np.ones((2, 4), np.float32)
    named = _got(_write(tmp_path / "new.pkl", t, obs, action, {}), x)
    assert all(np.array_equal(a, b) for a, b in zip(_got(tmp_path / "old.pkl", x), named, strict=True))
    (tmp_path / "old.pkl").write_bytes(_pickled((data, list(t.values())[2:])))
    with pytest.raises(FormatError, match=r"old\.pkl: lists 12 variables without names"):
        load(tmp_path / "old.pkl")


def test_an_lstm_policy_step_by_step(tmp_path: Path) -> None:
    num = 5
    shapes = {"model/lstm1/wx": (6, 4 * num), "model/lstm1/wh": (num, 4 * num), "model/lstm1/b": (4 * num,)}
    t = _tensors({**_linear({"model/pi_fc0": (4, 6), "model/vf": (num, 1), "model/pi": (num, 3)}), **shapes})
    path = _write(tmp_path / "a.zip", t, Box(-1, 1, (4,)), Discrete(3), {})
    x = np.random.default_rng(1).normal(size=(2, 7, 4)).astype(np.float32)

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    c = h = np.zeros((2, num), np.float32)
    rows = []
    for step in range(7):
        latent = np.tanh(x[:, step] @ t["model/pi_fc0/w:0"] + t["model/pi_fc0/b:0"])
        gates = latent @ t["model/lstm1/wx:0"] + h @ t["model/lstm1/wh:0"] + t["model/lstm1/b:0"]
        i, f, o, g = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        rows.append(h)
    hidden = np.stack(rows, 1)
    logits, value = _got(path, x)
    assert _near(logits, hidden @ t["model/pi/w:0"] + t["model/pi/b:0"])
    assert _near(value, hidden @ t["model/vf/w:0"] + t["model/vf/b:0"])
    assert policy_from(load(path)).is_recurrent


def test_images_through_the_nature_network(tmp_path: Path) -> None:
    convolutions = {"c1": (8, 8, 2, 3), "c2": (4, 4, 3, 4), "c3": (3, 3, 4, 4)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in convolutions.items():
        shapes |= {f"model/{name}/w": shape, f"model/{name}/b": (1, shape[3], 1, 1)}
    t = _tensors({**shapes, **_linear({"model/fc1": (16, 6), "model/vf": (6, 1), "model/pi": (6, 3)})})
    path = _write(tmp_path / "a.zip", t, Box(0, 255, (44, 44, 2), "uint8"), Discrete(3), {})
    x = np.random.default_rng(1).integers(0, 256, (2, 44, 44, 2)).astype(np.float32)
    y = x / 255
    for (name, shape), stride in zip(convolutions.items(), (4, 2, 1), strict=True):
        views = np.lib.stride_tricks.sliding_window_view(y, shape[:2], (1, 2))[:, ::stride, ::stride]
        y = np.einsum("nhwcij,ijco->nhwo", views, t[f"model/{name}/w:0"]) + t[f"model/{name}/b:0"].reshape(-1)
        y = np.maximum(y, 0)
    y = np.maximum(y.reshape(2, -1) @ t["model/fc1/w:0"] + t["model/fc1/b:0"], 0)
    logits, value = _got(path, x)
    assert _near(logits, y @ t["model/pi/w:0"] + t["model/pi/b:0"])
    assert _near(value, y @ t["model/vf/w:0"] + t["model/vf/b:0"])


@pytest.mark.parametrize("norm", [False, True])
def test_dueling_action_values(norm: bool, tmp_path: Path) -> None:
    sizes = {}
    for stream, num in (("action_value", 3), ("state_value", 1)):
        root = f"deepq/model/{stream}/fully_connected"
        sizes |= {root: (4, 6), f"{root}_1": (6, 5), f"{root}_2": (5, num)}
    shapes = {**_linear(sizes, "weights", "biases"), "deepq/eps": ()}
    for stream in ("action_value", "state_value") if norm else ():
        for index, num in (("", 6), ("_1", 5)):
            shapes |= {f"deepq/model/{stream}/LayerNorm{index}/{part}": (num,) for part in ("beta", "gamma")}
    t = _tensors(shapes)
    path = _write(tmp_path / "a.zip", t, Box(-1, 1, (4,)), Discrete(3), {})
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)

    def stream(root: str) -> np.ndarray:
        y = x
        for i in range(3):
            index = f"_{i}" if i else ""
            name = f"deepq/model/{root}/fully_connected{index}"
            y = y @ t[f"{name}/weights:0"] + t[f"{name}/biases:0"]
            if i < 2:
                if norm:
                    centred = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-12)
                    gamma, beta = (t[f"deepq/model/{root}/LayerNorm{index}/{p}:0"] for p in ("gamma", "beta"))
                    y = centred * gamma + beta
                y = np.maximum(y, 0)
        return y

    scores = stream("action_value")
    (q,) = _got(path, x)
    assert _near(q, stream("state_value") + scores - scores.mean(1, keepdims=True))


def test_sac_and_td3(tmp_path: Path) -> None:
    hidden = {"model/pi/fc0": (4, 6), "model/pi/fc1": (6, 5), "model/pi/dense": (5, 2)}
    critic = {"model/values_fn/vf/fc0": (4, 6)}
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    for extra in ({"model/pi/dense_1": (5, 2)}, {}):
        t = _tensors(_linear({**hidden, **extra, **critic}, "kernel", "bias"))
        path = _write(tmp_path / "a.zip", t, Box(-1, 1, (4,)), Box(-2, 2, (2,)), {"act_fun": None})
        y = x
        for i in range(2):
            y = np.maximum(y @ t[f"model/pi/fc{i}/kernel:0"] + t[f"model/pi/fc{i}/bias:0"], 0)
        mean = y @ t["model/pi/dense/kernel:0"] + t["model/pi/dense/bias:0"]
        got = _got(path, x)
        assert _near(got[-1], np.tanh(mean))
        if extra:
            log_std = y @ t["model/pi/dense_1/kernel:0"] + t["model/pi/dense_1/bias:0"]
            assert _near(got[0], np.concatenate([mean, np.clip(log_std, -20, 2)], 1))


def test_what_has_no_template_or_is_damaged_is_named(tmp_path: Path) -> None:
    t = _tensors(_linear(ACTOR_CRITIC))
    obs, action = Box(-1, 1, (4,)), Discrete(3)
    path = _write(tmp_path / "a.zip", {"other/w:0": t["model/pi/w:0"]}, obs, action, {})
    with pytest.raises(FormatError, match=r"a\.zip: a policy without a template: its variables are \['other/w'\]"):
        load(path)
    norm = {"model/lstm1/gx:0": np.ones(4), "model/lstm1/wx:0": np.ones((6, 4))}
    with pytest.raises(FormatError, match="an LSTM behind images, or with LayerNorm inside"):
        load(_write(path, {**t, **norm}, obs, action, {}))
    with zipfile.ZipFile(_write(path, t, obs, action, {})) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    bad = io.BytesIO()
    with zipfile.ZipFile(bad, "w") as inner:
        header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000), }".ljust(117) + "\n"
        inner.writestr("model/pi/w:0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, "parameters": bad.getvalue()}.items():
            archive.writestr(name, data)
    with pytest.raises(FormatError, match=r"a\.zip: array 'model/pi/w:0\.npy' is damaged"):
        load(path)


@pytest.mark.slow
@pytest.mark.skipif(not AGENTS, reason="LOCKSTEP_SB2_AGENTS names no folder of real agents")
@pytest.mark.parametrize(
    ("file", "env", "least"),
    [
        ("ppo2/CartPole-v1.pkl", "CartPole-v1", 499.0),
        ("a2c/CartPole-v1.pkl", "CartPole-v1", 490.0),
        ("acktr/Pendulum-v0.zip", "Pendulum-v1", -300.0),
        ("td3/Pendulum-v0.pkl", "Pendulum-v1", -200.0),
    ],
)
def test_agents_that_the_real_one_trained_still_play(file: str, env: str, least: float) -> None:
    assert evaluate(policy_from(load(Path(AGENTS) / file)), env=env, episodes=20).mean >= least
