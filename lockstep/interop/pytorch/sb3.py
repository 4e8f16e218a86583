"""Policies of Stable-Baselines3 (`.zip`), without Stable-Baselines3: the deployed network, its spaces, its normaliser.

PPO and A2C: logits or mean, and value. DQN: q. SAC: parameters (mean and log-std side by side) and action. TD3 and DDPG:
action. Critics of replay algorithms are training state and stay behind.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import FormatError
from lockstep.core.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, Space, space_to_json
from lockstep.interop.archives import Archive
from lockstep.interop.chains import ACTIVATIONS, chain, layers_of
from lockstep.interop.pickles import Record, load_pickle, record_class
from lockstep.interop.pytorch.state import tensors_of, unpickle
from lockstep.interop.wire import read_file
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About
from lockstep.models.graph.module import GraphModule

RECORDS = (
    "gymnasium.",
    "gym.",
    "numpy.random.",
    "stable_baselines3.",
    "sb3_contrib.",
    "torch.nn.modules.",
    "torch.optim.",
)
MAX_PICKLE_BYTES = 1 << 28
FEATURES = ("FlattenExtractor", "NatureCNN")
"""Feature extractors with a template; others are code of the user."""


def is_sb3(path: Path) -> bool:
    """Whether a `.zip` has the members of Stable-Baselines3."""
    try:
        archive = Archive(path, "a zip archive")
    except FormatError:
        return False
    return "data" in archive and "policy.pth" in archive


def read_sb3(path: Path, *, normalize: str | Path = "") -> GraphModule:
    """Read a model that `model.save` wrote.

    Args:
        normalize: the `.pkl` that `VecNormalize.save` wrote; its statistics become the network's first operations.

    Raises:
        FormatError: damaged; a policy with code of the user's, or of an algorithm without a template.
    """
    path = Path(path)
    archive = Archive(path, "a zip file of Stable-Baselines3")
    settings = settings_of(archive)
    tensors = _policy_tensors(archive)
    spaces = {key: space_of(value_of(settings, key, path), path) for key in ("observation_space", "action_space")}
    try:
        return _Template(settings, tensors, spaces["observation_space"], spaces["action_space"], path).build(normalize)
    except FormatError as error:
        raise error if error.path else FormatError(error.reason, path=str(path), op=error.op) from error


def settings_of(archive: Archive) -> dict[str, Any]:
    """The member 'data': settings as JSON.

    Raises:
        FormatError: it is none.
    """
    try:
        settings = json.loads(archive.read("data"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its member 'data' is not JSON: {error}", path=str(archive.path)) from error
    if not isinstance(settings, dict):
        raise FormatError("its member 'data' is no JSON object", path=str(archive.path))
    return settings


def _policy_tensors(archive: Archive) -> dict[str, torch.Tensor]:
    """`policy.pth`, itself an archive, lies inside of the archive."""
    inner = Archive(archive.path, "policy.pth of Stable-Baselines3", archive.read("policy.pth"))
    roots = [name for name in inner.names if name.endswith("data.pkl")]
    if len(roots) != 1:
        raise FormatError("policy.pth holds no state dict of PyTorch 1.6 or newer", path=str(archive.path))
    return tensors_of(unpickle(inner, roots[0].removesuffix("data.pkl")), archive.path)


def value_of(
    settings: Mapping[str, Any],
    key: str,
    path: Path,
    records: Collection[str] = RECORDS,
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """An entry: plain JSON, or a pickle in base64 with what `load_pickle` lets it name.

    Raises:
        FormatError: damaged, or it names something else.
    """
    entry = settings.get(key)
    if not isinstance(entry, dict) or ":serialized:" not in entry:
        return entry
    try:
        data = base64.b64decode(str(entry[":serialized:"]), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"entry {key!r} is no base64: {error}", path=str(path)) from error
    hint = f"its {key} was saved with code of the user's"
    return load_pickle(data, str(path), records=records, functions=functions, hint=hint)


def width_of(space: Space) -> int:
    """Numbers that a dense network sees of one observation, discrete ones as one-hot.

    Raises:
        FormatError: a space whose observations are no single vector.
    """
    match space:
        case DiscreteSpace():
            return space.n
        case MultiDiscreteSpace():
            return sum(space.nvec)
        case BoxSpace():
            return int(np.prod(space.shape))
    raise FormatError(f"observations {space}")


def space_of(value: Any, path: Path) -> Space:
    """A pickled space of Gymnasium or Gym.

    Raises:
        FormatError: a kind that policies do not have here.
    """
    if not isinstance(value, Record):
        raise FormatError(f"has no space but {type(value).__name__}", path=str(path))
    kind, state = value.name.rpartition(".")[2], value.state
    try:
        if kind == "Box":
            low, high = (np.asarray(state[key], np.float64).reshape(-1) for key in ("low", "high"))
            # Gym before 0.18 says shape and no _shape, the oldest neither.
            shape = tuple(int(n) for n in state.get("_shape") or state.get("shape") or np.shape(state["low"]))
            dtype = str(np.dtype(state.get("dtype") or "float32"))
            bounds = [tuple(x.tolist()) if (x != x[0]).any() else (float(x[0]),) for x in (low, high)]
            return BoxSpace(shape, dtype, *bounds)
        if kind == "Discrete":
            return DiscreteSpace(int(state["n"]), int(state.get("start", 0)))
        if kind == "MultiDiscrete":
            return MultiDiscreteSpace(tuple(int(n) for n in np.asarray(state["nvec"]).reshape(-1)))
        if kind == "MultiBinary":
            return MultiDiscreteSpace((2,) * int(np.prod(state["n"])))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise FormatError(f"space {value.name} is damaged: {error!r}", path=str(path)) from error
    raise FormatError(f"a space {value.name}; Box, Discrete and MultiDiscrete are read", path=str(path))


def _activation(kwargs: Mapping[str, Any], default: str) -> str:
    word = kwargs.get("activation_fn")
    if word is None:
        return default
    name = word.name.rpartition(".")[2] if isinstance(word, type) and issubclass(word, Record) else str(word)
    known = {"LeakyReLU": "leaky_relu", "Identity": "none", "Hardsigmoid": "hard_sigmoid"}.get(name, name.lower())
    if known not in ACTIVATIONS:
        raise FormatError(f"activation_fn {name} is not known; known: {sorted(ACTIVATIONS)}")
    return known


class _Template:
    """One policy on its way into a graph."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        tensors: dict[str, torch.Tensor],
        obs_space: Space,
        action_space: Space,
        path: Path,
    ) -> None:
        kwargs = value_of(settings, "policy_kwargs", path)
        self.kwargs: dict[str, Any] = kwargs if isinstance(kwargs, dict) else {}
        self.tensors, self.path = tensors, path
        self.obs_space, self.action_space = obs_space, action_space
        self.make = GraphBuilder()
        self.head, self.notes = "", {"sde": str(bool(settings.get("use_sde")))}
        extractor = self.kwargs.get("features_extractor_class")
        if isinstance(extractor, type) and issubclass(extractor, Record):
            name = extractor.name.rpartition(".")[2]
            if name not in FEATURES:
                raise FormatError(f"features_extractor_class {name} is code of the user's; known: {FEATURES}")

    def build(self, normalize: str | Path) -> GraphModule:
        names = self.tensors
        if "action_net.weight" in names:
            outputs = self._actor_critic
        elif any(name.startswith("q_net.q_net.") for name in names):
            outputs = self._q_network
        elif any(name.startswith("actor.mu.") for name in names):
            outputs = self._continuous
        else:
            raise FormatError(f"a policy without a template: its weights are {sorted(names)[:6]}")
        outputs(self._input(normalize))
        log_std = self.tensors.get("log_std")
        plain = log_std is not None and log_std.ndim == 1 and self.head == "gaussian"
        about = About(
            format="sb3",
            producer="stable-baselines3",
            layout="NCHW" if isinstance(self.obs_space, BoxSpace) and len(self.obs_space.shape) == 3 else "",
            head=self.head,
            log_std=tuple(log_std.tolist()) if plain and log_std is not None else (),
            obs_space=space_to_json(self.obs_space),
            action_space=space_to_json(self.action_space),
            notes=self.notes,
        )
        return self.make.build(about=about)

    def _input(self, normalize: str | Path) -> str:
        self.port = "observation"
        self.shape: tuple[int | str | None, ...] = ("rows", width_of(self.obs_space))
        if self._is_image():
            assert isinstance(self.obs_space, BoxSpace)
            self.shape = ("rows", *self.obs_space.shape)
        x = self.make.input(self.port, shape=self.shape)
        if normalize:
            return self._normalised(x, Path(normalize))
        if self._is_image() and self.kwargs.get("normalize_images", True):
            x = self.make.node("Div", [x, self.make.constant(255.0, "float32")])
        return x

    def _is_image(self) -> bool:
        return any(tensor.ndim == 4 for tensor in self.tensors.values())

    def _normalised(self, x: str, path: Path) -> str:
        mean, var, clip, epsilon = read_vec_normalize(path)
        if mean.size != width_of(self.obs_space):
            raise FormatError(
                f"normalises {mean.size} columns; the policy has {width_of(self.obs_space)}", path=str(path)
            )
        std = np.sqrt(var + epsilon)
        make = self.make
        shape = (-1,) if not self._is_image() else mean.shape
        for op, value in (("Sub", mean), ("Div", std)):
            stored = make.tensor(f"observation.{op.lower()}", value.reshape(shape).astype(np.float32), trainable=False)
            x = make.node(op, [x, stored])
        return make.node("Clip", [x, make.constant(-clip, "float32"), make.constant(clip, "float32")])

    def _features(self, x: str, prefix: str) -> str:
        """Images through the convolutions of Mnih et al. 2015 and a dense layer, ReLU behind each; vectors as they are."""
        layers = layers_of(self.tensors, f"{prefix}cnn.") + layers_of(self.tensors, f"{prefix}linear.")
        return chain(self.make, x, layers, "relu", last="relu") if layers else x

    def _extracted(self, x: str, owner: str) -> str:
        own = f"{owner}features_extractor."
        return self._features(x, own if any(name.startswith(own) for name in self.tensors) else "features_extractor.")

    def _body(self, x: str, prefix: str, word: str) -> str:
        layers = layers_of(self.tensors, prefix)
        return chain(self.make, x, layers, word, last=word) if layers else x

    def _actor_critic(self, x: str) -> None:
        word = _activation(self.kwargs, "tanh")
        latents = {}
        shared = not any(name.startswith("pi_features_extractor.") for name in self.tensors) or bool(
            self.kwargs.get("share_features_extractor", True)
        )
        features = self._features(x, "features_extractor.")
        for kind, body in (("pi", "policy_net"), ("vf", "value_net")):
            own = features if shared else self._features(x, f"{kind}_features_extractor.")
            latents[kind] = self._body(own, f"mlp_extractor.{body}.", word)
        self.head = "gaussian" if isinstance(self.action_space, BoxSpace) else "categorical"
        out = chain(self.make, latents["pi"], layers_of(self.tensors, "action_net."), "none")
        self.make.output(out, "mean" if self.head == "gaussian" else "logits", shape=("rows", None))
        value = chain(self.make, latents["vf"], layers_of(self.tensors, "value_net."), "none")
        self.make.output(value, "value", shape=("rows", 1))

    def _q_network(self, x: str) -> None:
        self.head = "q"
        x = self._extracted(x, "q_net.")
        out = chain(self.make, x, layers_of(self.tensors, "q_net.q_net."), _activation(self.kwargs, "relu"))
        self.make.output(out, "q", shape=("rows", None))

    def _continuous(self, x: str) -> None:
        word = _activation(self.kwargs, "relu")
        x = self._extracted(x, "actor.")
        if not any(name.startswith("actor.log_std") for name in self.tensors):
            self.head = "deterministic"
            out = chain(self.make, x, layers_of(self.tensors, "actor.mu."), word, last="tanh")
            self.make.output(out, "action", shape=("rows", None))
            return
        if "actor.log_std.weight" not in self.tensors:
            raise FormatError("SAC with state-dependent exploration (use_sde) has no template")
        self.head = "squashed"
        x = self._body(x, "actor.latent_pi.", word)
        mean = chain(self.make, x, layers_of(self.tensors, "actor.mu."), "none")
        log_std = chain(self.make, x, layers_of(self.tensors, "actor.log_std."), "none")
        bounds = [self.make.constant(bound, "float32") for bound in (-20.0, 2.0)]
        log_std = self.make.node("Clip", [log_std, *bounds])
        both = self.make.node("Concat", [mean, log_std], axis=1)
        self.make.output(both, "parameters", shape=("rows", None))
        self.make.output(self.make.node("Tanh", [mean]), "action", shape=("rows", None))


def read_vec_normalize(path: Path, records: Collection[str] = RECORDS) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(mean, variance, clip, epsilon) of the observations, from the `.pkl` of `VecNormalize.save`, or the `obs_rms.pkl` that
    Stable-Baselines 2 wrote before (its clip and epsilon are then the defaults).

    Raises:
        FormatError: damaged, or not of VecNormalize.
    """
    value = load_pickle(read_file(path, MAX_PICKLE_BYTES), str(path), records=records)
    if isinstance(value, Record) and value.name.endswith("RunningMeanStd"):
        value = _defaults(value)
    state = value.state if isinstance(value, Record) and value.name.endswith("VecNormalize") else {}
    statistics = state.get("obs_rms")
    if not isinstance(statistics, Record):
        raise FormatError("is no VecNormalize of one array of observations", path=str(path))
    try:
        mean, var = (np.asarray(statistics.state[key], np.float64) for key in ("mean", "var"))
        clip, epsilon = float(state["clip_obs"]), float(state["epsilon"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"its statistics are damaged: {error!r}", path=str(path)) from error
    if mean.shape != var.shape or not (np.isfinite(mean).all() and (var >= 0).all()):
        raise FormatError("its statistics are damaged: not finite, or of two shapes", path=str(path))
    if not state.get("norm_obs", True):
        return np.zeros_like(mean), np.ones_like(var), float("inf"), 0.0
    return mean, var, clip, epsilon


def _defaults(statistics: Record) -> Record:
    """A VecNormalize with its default settings around statistics that were saved alone."""
    made = record_class("VecNormalize")()
    made.state = {"clip_obs": 10.0, "epsilon": 1e-8, "obs_rms": statistics}
    return made
