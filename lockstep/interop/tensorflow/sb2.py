"""Policies of Stable-Baselines 2, without TensorFlow and without it: `.zip` of 2.8 and newer, `.pkl` of before.

A zip holds `data` (settings as JSON, spaces as pickles in base64), `parameters` (an .npz of variables) and `parameter_list`;
a .pkl holds the pair (settings, variables by name, or before 2.6 a plain list of them). Their names tell the network:

    A2C, ACER, ACKTR, PPO1, PPO2, TRPO   model/{c1,c2,c3,fc1,shared_fcN,pi_fcN,vf_fcN,lstm1,pi,vf}/{w,b}, model/pi/logstd
    DQN                                  deepq/model/{action_value,state_value}/{fully_connected_N,LayerNorm_N}/...
    SAC, TD3, DDPG                       model/pi/{fcN,LayerNorm_N,dense,dense_1,pi}/{kernel,bias}

Critics of replay algorithms are training state and stay behind.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import FormatError
from lockstep.core.spaces import BoxSpace, Space, space_to_json
from lockstep.interop.archives import Archive
from lockstep.interop.chains import ACTIVATIONS, Layer, activation, chain
from lockstep.interop.pickles import Record, load_pickle, record_class
from lockstep.interop.pytorch.sb3 import RECORDS, read_vec_normalize, settings_of, space_of, value_of, width_of
from lockstep.interop.wire import read_file
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About, Dim
from lockstep.models.graph.module import GraphModule

SB2_RECORDS = (*RECORDS, "stable_baselines.", "cloudpickle.", "tensorflow.", "utils.", "builtins.", "types.")
"""Classes and functions that such pickles mention (schedules are pickled code): inert records, nothing of them is run."""
CODE = {"cloudpickle.cloudpickle._builtin_type": lambda *words: record_class("code")}
MAX_BYTES = 1 << 30
NORM_EPSILON = 1e-12
"""Of tf.contrib's layer_norm."""
LOG_STD_BOUNDS = (-20.0, 2.0)


def is_sb2(path: Path) -> bool:
    """Whether a file is a zip with the members of Stable-Baselines 2, or a pickle."""
    if path.suffix == ".pkl":
        return True
    try:
        archive = Archive(path, "a zip archive")
    except FormatError:
        return False
    return "data" in archive and "parameters" in archive


def read_sb2(path: Path, *, normalize: str | Path = "", activation: str = "") -> GraphModule:
    """Read a model that `model.save` wrote.

    Args:
        normalize: the `.pkl` of `VecNormalize.save`, or `obs_rms.pkl`; its statistics become the network's first operations.
        activation: between the layers, where the policy is a class of the user's; "" takes what the file says, or the default
            of its algorithm (tanh for policies with a value, else relu).

    Raises:
        FormatError: damaged; or a policy without a template (LayerNorm or images in front of an LSTM, classes of the user's).
    """
    path = Path(path)
    settings, tensors = _opened(path)
    spaces = [
        space_of(value_of(settings, key, path, SB2_RECORDS, CODE), path)
        for key in ("observation_space", "action_space")
    ]
    try:
        word = activation or _activation(value_of(settings, "policy_kwargs", path, SB2_RECORDS, CODE))
        return _Template(tensors, spaces[0], spaces[1], word).build(normalize)
    except FormatError as error:
        raise error if error.path else FormatError(error.reason, path=str(path), op=error.op) from error


def _opened(path: Path) -> tuple[Mapping[str, Any], dict[str, torch.Tensor]]:
    if path.suffix != ".pkl":
        archive = Archive(path, "a zip file of Stable-Baselines 2")
        settings = settings_of(archive)
        arrays = read_npz(Archive(path, "'parameters' of Stable-Baselines 2", archive.read("parameters")))
        listed = _listed(archive)
        missing = [name for name in listed if name not in arrays]
        if missing:
            raise FormatError(f"lists the parameters {missing[:3]} and does not hold them", path=str(path))
        return settings, _tensors(arrays)
    value = load_pickle(read_file(path, MAX_BYTES), str(path), records=SB2_RECORDS, functions=CODE)
    if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], dict):
        raise FormatError(
            "is no model of Stable-Baselines 2: a pair of settings and variables was expected", path=str(path)
        )
    settings, held = value
    if isinstance(held, list):
        held = _named(held, path)
    if not isinstance(held, dict):
        raise FormatError(f"its variables are a {type(held).__name__}", path=str(path))
    return settings, _tensors({str(name): array for name, array in held.items()})


def _listed(archive: Archive) -> list[str]:
    if "parameter_list" not in archive:
        return []
    try:
        names = json.loads(archive.read("parameter_list"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its parameter_list is no JSON: {error}", path=str(archive.path)) from error
    return [str(name) for name in names] if isinstance(names, list) else []


def _tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Variables without ":0"; numbers that are no arrays (rates) stay out, as do those of other element types."""
    kept = {name: x for name, x in arrays.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
    return {name.removesuffix(":0"): torch.from_numpy(np.array(x, np.float32)) for name, x in kept.items()}


def read_npz(archive: Archive) -> dict[str, np.ndarray]:
    """Arrays of an `.npz`; a header that says more than its bytes hold, or objects, are an error.

    Raises:
        FormatError: damaged.
    """
    arrays = {}
    for member in archive.names:
        stream = BytesIO(archive.read(member))
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            raw = stream.read()
            if dtype.hasobject or min(shape, default=0) < 0 or len(raw) != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{dtype} {shape} in {len(raw)} bytes")
            array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
        except (ValueError, TypeError, EOFError, SyntaxError, RecursionError, MemoryError) as error:
            raise FormatError(f"array {member!r} is damaged: {str(error)[:200]}", path=str(archive.path)) from error
        arrays[member.removesuffix(".npy")] = array
    return arrays


def _named(arrays: Sequence[Any], path: Path) -> dict[str, Any]:
    """Names of the plain lists of before 2.6, for dense policies with a value: they follow the order of creation."""
    found: dict[str, Any] = {}
    shapes = [np.shape(x) for x in arrays]

    def take(name: str, at: int) -> int:
        found[f"model/{name}/w"], found[f"model/{name}/b"] = arrays[at], arrays[at + 1]
        return at + 2

    try:
        at = layer = 0
        while shapes[at][1] != 1:
            if shapes[at] != shapes[at + 2]:
                raise IndexError
            at = take(f"vf_fc{layer}", take(f"pi_fc{layer}", at))
            layer += 1
        at = take("pi", take("vf", at))
        if at < len(arrays) and shapes[at] == (1, *shapes[at - 1]):
            found["model/pi/logstd"] = arrays[at]
        if not layer or any(len(shapes[i]) != 2 for i in range(0, 4 * layer, 2)):
            raise IndexError
    except IndexError:
        raise FormatError(
            f"lists {len(arrays)} variables without names (Stable-Baselines before 2.6), which are read for dense policies of "
            "A2C, ACER, ACKTR, PPO and TRPO; load and save it with a newer Stable-Baselines 2",
            path=str(path),
        ) from None
    return found


def _activation(kwargs: Any) -> str:
    word = kwargs.get("act_fun") if isinstance(kwargs, dict) else None
    if word is None:
        return ""
    name = word.name.rpartition(".")[2] if isinstance(word, type) and issubclass(word, Record) else str(word)
    if name not in ACTIVATIONS:
        raise FormatError(f"act_fun {name:.60} is not known; give activation=, one of {sorted(ACTIVATIONS)}")
    return name


class _Template:
    """One policy on its way into a graph."""

    def __init__(self, tensors: dict[str, torch.Tensor], obs_space: Space, action_space: Space, word: str) -> None:
        self.tensors, self.word = tensors, word
        self.obs_space, self.action_space = obs_space, action_space
        self.make = GraphBuilder()
        self.head, self.log_std = "", ()

    def build(self, normalize: str | Path) -> GraphModule:
        names = self.tensors
        if "model/pi/w" in names:
            self._actor_critic(self._input(normalize))
        elif any(name.startswith("deepq/model/action_value/") for name in names):
            self._q_network(self._input(normalize))
        elif any(name.startswith("model/pi/") and name.endswith("kernel") for name in names):
            self._deterministic_or_squashed(self._input(normalize))
        else:
            raise FormatError(f"a policy without a template: its variables are {sorted(names)[:6]}")
        about = About(
            format="sb2",
            producer="stable-baselines 2",
            layout="NHWC" if self._is_image() else "",
            head=self.head,
            log_std=self.log_std,
            obs_space=space_to_json(self.obs_space),
            action_space=space_to_json(self.action_space),
        )
        return self.make.build(about=about)

    def _is_image(self) -> bool:
        return any(tensor.ndim == 4 and min(tensor.shape[:2]) > 1 for tensor in self.tensors.values())

    def _input(self, normalize: str | Path) -> str:
        shape: tuple[Dim, ...] = ("rows", width_of(self.obs_space))
        if self._is_image():
            if not isinstance(self.obs_space, BoxSpace) or len(self.obs_space.shape) != 3:
                raise FormatError(f"has convolutions for the observations {self.obs_space}")
            shape = ("rows", *self.obs_space.shape)
        elif "model/lstm1/wx" in self.tensors:
            shape = ("rows", "steps", width_of(self.obs_space))
        x = self.make.input("observation", shape=shape)
        if normalize:
            mean, var, clip, epsilon = read_vec_normalize(Path(normalize), SB2_RECORDS)
            if mean.shape != tuple(n for n in shape[1:] if n != "steps"):
                raise FormatError(f"normalises {mean.shape}; the policy has {shape[1:]}", path=str(normalize))
            for op, value in (("Sub", mean), ("Div", np.sqrt(var + epsilon))):
                stored = self.make.tensor(f"observation.{op.lower()}", value.astype(np.float32), trainable=False)
                x = self.make.node(op, [x, stored])
            return self.make.node("Clip", [x, *(self.make.constant(bound, "float32") for bound in (-clip, clip))])
        return self._scaled(x) if self._is_image() else x

    def _scaled(self, x: str) -> str:
        """Policies with convolutions see images between 0 and 1, by the bounds of their space."""
        assert isinstance(self.obs_space, BoxSpace)
        bounds = [np.asarray(bound, np.float64) for bound in (self.obs_space.low, self.obs_space.high)]
        if not all(np.isfinite(bound).all() for bound in bounds):
            return x
        low, high = (bound if bound.size == 1 else bound.reshape(self.obs_space.shape) for bound in bounds)
        for op, value in (("Sub", low), ("Div", high - low)):
            stored = self.make.tensor(f"observation.{op.lower()}", np.asarray(value, np.float32), trainable=False)
            x = self.make.node(op, [x, stored])
        return x

    def _dense(self, scope: str) -> Layer:
        """One dense layer by its scope, whatever its maker called weight and bias."""
        for kernel, bias in (("w", "b"), ("kernel", "bias"), ("weights", "biases")):
            weight = self.tensors.get(f"{scope}/{kernel}")
            if weight is not None:
                if weight.ndim != 2:
                    raise FormatError(f"{scope}/{kernel} has the shape {list(weight.shape)}; a matrix was expected")
                return Layer(scope, weight.T.contiguous(), self.tensors.get(f"{scope}/{bias}"))
        raise FormatError(f"has no weights of {scope}")

    def _numbered(self, stem: str) -> list[Layer]:
        """Layers "stem0", "stem1", ..., or (tf.contrib) "stem", "stem_1", ...; with the LayerNorms beside them."""
        prefix, _, word = stem.rpartition("/")
        pattern = re.compile(rf"{re.escape(stem)}_?(\d*)/(?:w|kernel|weights)")
        found = {
            int(m.group(1) or 0): name.rpartition("/")[0] for name in self.tensors if (m := pattern.fullmatch(name))
        }
        layers = [self._dense(found[number]) for number in sorted(found)]
        norms = {int(m.group(1) or 0): m.group(0).rpartition("/")[0] for m in self._norms(prefix)}
        for number, scope in norms.items():
            if number >= len(layers):
                raise FormatError(f"{scope} stands behind no layer of {word}")
            layers[number].norm = {
                "weight": self.tensors[f"{scope}/gamma"],
                "bias": self.tensors.get(f"{scope}/beta", torch.zeros_like(self.tensors[f"{scope}/gamma"])),
            }
            layers[number].norm_epsilon = NORM_EPSILON
        return layers

    def _norms(self, prefix: str) -> list[re.Match[str]]:
        pattern = re.compile(rf"{re.escape(prefix)}/LayerNorm_?(\d*)/gamma")
        return [m for name in self.tensors if (m := pattern.fullmatch(name))]

    def _features(self, x: str, prefix: str) -> str:
        """Images [N, H, W, C] through the convolutions of Mnih et al. 2015 and a dense layer; rows as they are."""
        if not self._is_image():
            return x
        layers = []
        for name in ("c1", "c2", "c3"):
            kernel, bias = (self.tensors.get(f"{prefix}{name}/{part}") for part in ("w", "b"))
            if kernel is None or kernel.ndim != 4:
                raise FormatError(f"has no convolution {prefix}{name}: images go through a network of the user's")
            flat = None if bias is None else bias.reshape(-1)
            layers.append(Layer(f"{prefix}{name}", kernel.permute(3, 2, 0, 1).contiguous(), flat))
        x = self.make.node("Transpose", [x], perm=[0, 3, 1, 2])
        x = chain(self.make, x, layers, "relu", last="relu")
        x = self.make.node("Flatten", [self.make.node("Transpose", [x], perm=[0, 2, 3, 1])], axis=1)
        return chain(self.make, x, [self._dense(f"{prefix}fc1")], "relu", last="relu")

    def _body(self, x: str, layers: Sequence[Layer], word: str) -> str:
        return chain(self.make, x, layers, word, last=word) if layers else x

    def _actor_critic(self, x: str) -> None:
        word = self.word or "tanh"
        logstd = self.tensors.get("model/pi/logstd")
        self.head = "gaussian" if isinstance(self.action_space, BoxSpace) else "categorical"
        self.log_std = () if logstd is None else tuple(logstd.reshape(-1).tolist())
        out_name = "mean" if self.head == "gaussian" else "logits"
        shared, pi, vf = (self._numbered(f"model/{name}") for name in ("shared_fc", "pi_fc", "vf_fc"))
        heads = ("pi", pi, out_name), ("vf", vf, "value")
        if "model/lstm1/wx" in self.tensors:
            # Without net_arch its dense layers are called pi_fc and stand in front of the LSTM.
            is_old = not shared and not vf
            x = self._recurrent(x, pi if is_old else shared, word)
            heads = ("pi", [] if is_old else pi, out_name), ("vf", vf, "value")
            for scope, layers, name in heads:
                self.make.output(
                    self._over_steps(x, [*layers, self._dense(f"model/{scope}")], word, last="none"),
                    name,
                    shape=("rows", "steps", None),
                )
            return
        x = self._body(self._features(x, "model/"), shared, word)
        for scope, layers, name in heads:
            latent = self._body(x, layers, word)
            self.make.output(
                chain(self.make, latent, [self._dense(f"model/{scope}")], "none"), name, shape=("rows", None)
            )

    def _over_steps(self, x: str, layers: Sequence[Layer], word: str, *, last: str) -> str:
        """Dense layers on [N, T, K]."""
        for index, layer in enumerate(layers):
            x = self.make.node("MatMul", [x, self.make.tensor(f"{layer.name}.weight", layer.weight.T.contiguous())])
            if layer.bias is not None:
                x = self.make.node("Add", [x, self.make.tensor(f"{layer.name}.bias", layer.bias)])
            x = activation(self.make, x, word if index < len(layers) - 1 else last)
        return x

    def _recurrent(self, x: str, layers: Sequence[Layer], word: str) -> str:
        """Gates i, f, o, g of [K, 4 H] become ONNX's i, o, f, c of [1, 4 H, K]; states begin at zero."""
        if self._is_image() or any("gx" in name.split("/") for name in self.tensors):
            raise FormatError("an LSTM behind images, or with LayerNorm inside, has no template")
        x = self._over_steps(x, layers, word, last=word)
        wx, wh, b = (self.tensors[f"model/lstm1/{part}"] for part in ("wx", "wh", "b"))
        size = wh.shape[0]
        if list(wh.shape) != [size, 4 * size] or wx.shape[1:] != wh.shape[1:] or list(b.shape) != [4 * size]:
            raise FormatError(f"model/lstm1 has the shapes {list(wx.shape)}, {list(wh.shape)}, {list(b.shape)}")

        def ordered(gates: torch.Tensor) -> torch.Tensor:
            i, f, o, g = gates.chunk(4)
            return torch.cat([i, o, f, g])[None].contiguous()

        stored = [
            self.make.tensor("model/lstm1/wx", ordered(wx.T)),
            self.make.tensor("model/lstm1/wh", ordered(wh.T)),
            self.make.node(
                "Concat",
                [
                    self.make.tensor("model/lstm1/b", ordered(b), trainable=True),
                    self.make.tensor("model/lstm1/zeros", torch.zeros(1, 4 * size), trainable=False),
                ],
                axis=1,
            ),
        ]
        steps = self.make.node("Transpose", [x], perm=[1, 0, 2])
        out = self.make.node("LSTM", [steps, *stored], hidden_size=size)
        out = self.make.node("Squeeze", [out, self.make.constant([1])])
        return self.make.node("Transpose", [out], perm=[1, 0, 2])

    def _q_network(self, x: str) -> None:
        self.head, word = "q", self.word or "relu"
        x = self._features(x, "deepq/model/action_value/")
        scores = chain(self.make, x, self._numbered("deepq/model/action_value/fully_connected"), word)
        state = self._numbered("deepq/model/state_value/fully_connected")
        if state:
            # Dueling (Wang et al. 2016): Q = V + A - mean A.
            value = chain(self.make, x, state, word)
            mean = self.make.node("ReduceMean", [scores, self.make.constant([1])], keepdims=1)
            scores = self.make.node("Add", [value, self.make.node("Sub", [scores, mean])])
        self.make.output(scores, "q", shape=("rows", None))

    def _deterministic_or_squashed(self, x: str) -> None:
        word = self.word or "relu"
        x = self._body(self._features(x, "model/pi/"), self._numbered_dense(), word)
        if "model/pi/dense_1/kernel" not in self.tensors:
            self.head = "deterministic"
            last = "model/pi/pi" if "model/pi/pi/kernel" in self.tensors else "model/pi/dense"
            out = chain(self.make, x, [self._dense(last)], "none", last="tanh")
            self.make.output(out, "action", shape=("rows", None))
            return
        self.head = "squashed"
        mean = chain(self.make, x, [self._dense("model/pi/dense")], "none")
        log_std = chain(self.make, x, [self._dense("model/pi/dense_1")], "none")
        bounds = [self.make.constant(bound, "float32") for bound in LOG_STD_BOUNDS]
        log_std = self.make.node("Clip", [log_std, *bounds])
        self.make.output(self.make.node("Concat", [mean, log_std], axis=1), "parameters", shape=("rows", None))
        self.make.output(self.make.node("Tanh", [mean]), "action", shape=("rows", None))

    def _numbered_dense(self) -> list[Layer]:
        """Hidden layers of an actor: model/pi/fc0, fc1, ... (fc1 with w and b is that of the convolutions)."""
        return self._numbered("model/pi/fc") if not self._is_image() else self._hidden_behind_images()

    def _hidden_behind_images(self) -> list[Layer]:
        convolutional = self.tensors.pop("model/pi/fc1/w", None), self.tensors.pop("model/pi/fc1/b", None)
        layers = self._numbered("model/pi/fc")
        for part, tensor in zip(("w", "b"), convolutional, strict=True):
            if tensor is not None:
                self.tensors[f"model/pi/fc1/{part}"] = tensor
        return layers
