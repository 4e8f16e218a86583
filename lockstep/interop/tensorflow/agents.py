"""Policies that TF-Agents' PolicySaver wrote, without TensorFlow: variables from the checkpoint, and the template that their
names and the operations of the stored functions tell.

    .../CategoricalProjectionNetwork/logits                     PPO, REINFORCE: logits
    .../NormalProjectionNetwork/means_projection_layer          PPO, REINFORCE: mean, squashed to the bounds or not;
      + bias_layer, or stddev_projection_layer                  its deviation; of SAC where the distribution itself is squashed
    .../TanhNormalProjectionNetwork/projection_layer            SAC: mean and log of the deviation
    .../action with tanh                                        ActorNetwork of DDPG and TD3
    any other last layer with a column for each action          QNetwork
    ValueNetwork/...                                            the state's value, where its activation is known
    mean, var / avg_0, count_0, m2_0                            normaliser of PPO's observations

A layer's activation, stride and padding are those of the operations in its scope.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import FormatError
from lockstep.core.spaces import BoxSpace, DiscreteSpace, space_to_json
from lockstep.interop.chains import activation
from lockstep.interop.tensorflow.agents_specs import AGENTS, read_specs
from lockstep.interop.tensorflow.bundle import read_checkpoint
from lockstep.interop.tensorflow.keras_weights import ENDING
from lockstep.interop.tensorflow.saved_model import Operation, read_saved_model
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About, Dim
from lockstep.models.graph.module import GraphModule

__all__ = ["AGENTS", "read_agents"]

WORDS = {
    "Relu": "relu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Elu": "elu",
    "Selu": "selu",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "LeakyRelu": "leaky_relu",
}
"""Operation of TensorFlow -> word of `chains`."""
LINEAR = ("MatMul", "Conv2D", "BiasAdd", "ReadVariableOp", "Cast", "Identity")
SHAPES = (
    *("Reshape", "Shape", "StridedSlice", "Pack", "ConcatV2", "Prod", "Const", "NoOp", "Cast", "Identity"),
    *("Squeeze", "ExpandDims", "ReadVariableOp", "GatherV2", "Placeholder"),
)
"""What stands between layers without computing anything."""
CLIP, EPSILON = 5.0, 1e-3
"""Of the normaliser of PPO."""
LOG_STD_BOUNDS = (-20.0, 2.0)


@dataclass
class Part:
    """A layer: scope, kernel, bias, and the operations of its scope."""

    scope: str
    kernel: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    operations: list[Operation] = field(default_factory=list)

    @property
    def projection(self) -> str:
        """The projection network that it belongs to, or ""."""
        return next((word for word in self.scope.split("/") if "ProjectionNetwork" in word), "")


def read_agents(path: Path, *, word: str = "") -> GraphModule:
    """Read a policy.

    Args:
        path: folder of the SavedModel.
        word: activation of a value network that no stored function runs (the greedy policy of PPO); empty: it is left out.

    Raises:
        FormatError: damaged, or a network without a template, such as one with recurrent or preprocessing layers.
    """
    try:
        return _Template(path, word).build()
    except FormatError as error:
        if error.path:
            raise
        raise FormatError(f"{error.reason}; signature='action' goes through tf2onnx", path=str(path)) from error


class _Template:
    def __init__(self, path: Path, word: str) -> None:
        self.path, self.word = path, word
        self.obs_space, self.action_space = read_specs(path / AGENTS)
        saved = read_saved_model(path)
        self.tensors = self._named(saved.variables)
        found: dict[str, Operation] = {}
        for name, operations in saved.functions.items():
            if re.search(r"(action|distribution)_fn", name):
                found.update({operation.name: operation for operation in operations})
        self.operations = list(found.values())
        self.make = GraphBuilder()
        self.networks: set[str] = set()
        self.head = ""
        self.log_std: tuple[float, ...] = ()
        self.notes: dict[str, str] = {}

    def _named(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        numbered = {}
        for key, tensor in read_checkpoint(self.path).items():
            found = re.fullmatch(r"model_variables/(\d+)", key.removesuffix(ENDING))
            if found:
                numbered[int(found.group(1))] = tensor
        if sorted(numbered) != list(range(len(names))) or len(set(names)) != len(names):
            raise FormatError(f"names {len(names)} variables and stores {len(numbered)}: damaged", path=str(self.path))
        if not names:
            raise FormatError("holds no model_variables")
        return {name: numbered[index] for index, name in enumerate(names)}

    def build(self) -> GraphModule:
        roots = self._roots()
        actors = [root for root, parts in roots.items() if any(p.projection or _is_action(p) for p in parts)]
        actor = (actors or list(roots))[0]
        others = [root for root in roots if root != actor]
        if len(actors) > 1 or any("Value" not in root for root in others):
            raise FormatError(f"holds the networks {list(roots)}, which no template joins")
        x = self._input(roots[actor])
        self._actor(actor, roots[actor], x)
        for root in others:
            self._value(root, roots[root], x)
        is_image = _kernel(roots[actor][0]).ndim == 4
        about = About(
            format="tf-agents",
            producer="tf-agents",
            layout="NHWC" if is_image else "",
            head=self.head,
            log_std=self.log_std,
            obs_space=None if self.obs_space is None else space_to_json(self.obs_space),
            action_space=space_to_json(self.action_space),
            notes=self.notes,
        )
        return self.make.build(about=about)

    def _roots(self) -> dict[str, list[Part]]:
        """Layers by network, in the order of their variables."""
        parts: dict[str, Part] = {}
        for name, tensor in self.tensors.items():
            scope, _, last = name.rpartition("/")
            if not scope:
                continue  # of the normaliser
            if last not in ("kernel", "bias"):
                raise FormatError(f"has the variable {name!r}, which no template knows")
            part = parts.setdefault(scope, Part(scope))
            if last == "kernel":
                part.kernel = tensor
            else:
                part.bias = tensor
        roots: dict[str, list[Part]] = {}
        for scope, part in parts.items():
            part.operations = [op for op in self.operations if op.name.startswith(f"{scope}/")]
            roots.setdefault(_root(scope), []).append(part)
        if not roots:
            raise FormatError(f"has the variables {list(self.tensors)[:6]}, which no template knows")
        self.networks = set(roots)
        for root, found in roots.items():
            self._check(root, found)
        return roots

    def _check(self, root: str, parts: list[Part]) -> None:
        """Refuse operations beside the layers: preprocessing, combiners, code of the user's."""
        for operation in self.operations:
            scope, _, last = operation.name.rpartition("/")
            if _root(scope) != root or any(operation.name.startswith(f"{p.scope}/") for p in parts):
                continue
            scaled = scope == root and last in ("mul", "add") and any(map(_is_action, parts))
            if operation.kind not in SHAPES and "ProjectionNetwork" not in scope and not scaled:
                raise FormatError(f"has the operation {operation.kind} ({operation.name}) beside its layers")

    def _input(self, parts: list[Part]) -> str:
        kernel = _kernel(parts[0])
        shape: tuple[Dim, ...] = ("rows", int(kernel.shape[0]))
        if kernel.ndim == 4:
            sizes = self.obs_space.shape if isinstance(self.obs_space, BoxSpace) else (None, None, int(kernel.shape[2]))
            shape = ("rows", *sizes)
        x = self.make.input("observation", shape=shape)
        names = {name.partition("_0")[0]: tensor for name, tensor in self.tensors.items() if "/" not in name}
        if not names:
            return x
        if {"mean", "var"} <= set(names):
            mean, var = names["mean"], names["var"]
        elif {"avg", "count", "m2"} <= set(names):
            mean, var = names["avg"], names["m2"] / names["count"]
        else:
            raise FormatError(f"has the variables {sorted(names)}, which no template knows")
        if not any("normalized_tensor" in op.name for op in self.operations):
            raise FormatError("has a normaliser that its functions do not run")
        for op, value in (("Sub", mean), ("Mul", torch.rsqrt(var + EPSILON))):
            x = self.make.node(op, [x, self.make.tensor(f"observation.{op.lower()}", value.float(), trainable=False)])
        return self.make.node("Clip", [x, *(self.make.constant(bound, "float32") for bound in (-CLIP, CLIP))])

    def _chain(self, x: str, parts: list[Part], word: str = "") -> str:
        """Layers one after another; `word`: activation of all but the last, where no function tells it."""
        before: torch.Tensor | None = None
        channels_first = False
        for index, part in enumerate(parts):
            kernel = _kernel(part)
            inputs = [x, self.make.tensor(f"{part.scope}/kernel", _out_first(kernel))]
            if part.bias is not None:
                inputs.append(self.make.tensor(f"{part.scope}/bias", part.bias))
            if kernel.ndim == 4:
                if before is None:
                    inputs[0] = self.make.node("Transpose", [x], perm=[0, 3, 1, 2])
                x, channels_first = self.make.node("Conv", inputs, **_window(part)), True
            else:
                if channels_first:
                    rows = self.make.node("Transpose", [x], perm=[0, 2, 3, 1])
                    inputs[0], channels_first = self.make.node("Flatten", [rows], axis=1), False
                if before is not None and before.ndim == 2 and kernel.shape[0] != before.shape[1]:
                    raise FormatError(f"{part.scope} {list(kernel.shape)} does not follow {list(before.shape)}")
                x = self.make.node("Gemm", inputs, transB=1)
            if part.operations:
                x = _activated(self.make, x, part)
            elif index < len(parts) - 1:
                x = activation(self.make, x, word)
            before = kernel
        return x

    def _actor(self, root: str, parts: list[Part], x: str) -> None:
        projections = {part.projection for part in parts if part.projection}
        if len(projections) > 1:
            raise FormatError(f"has several actions, {sorted(projections)}")
        if not all(part.operations for part in parts if part.kernel is not None):
            raise FormatError(f"stores no function that runs {root}")
        kind = next(iter(projections), "")
        body = [part for part in parts if not part.projection]
        ends = {part.scope.rpartition("/")[2]: part for part in parts if part.projection}
        if kind and body:
            x = self._chain(x, body)
        if kind.startswith("CategoricalProjectionNetwork") and "logits" in ends:
            self.head = "categorical"
            self._output(self._chain(x, [ends["logits"]]), "logits")
        elif kind.startswith("TanhNormalProjectionNetwork") and "projection_layer" in ends:
            both = self._chain(x, [ends["projection_layer"]])
            size = int(_kernel(ends["projection_layer"]).shape[1]) // 2
            mean, std = self._half(both, 0, size), self._half(both, size, 2 * size)
            self._squashed(mean, self._log_std(std, ends["projection_layer"].scope))
        elif kind.startswith("NormalProjectionNetwork") and "means_projection_layer" in ends:
            self._normal(x, ends)
        elif kind:
            raise FormatError(f"has a projection {kind} with the layers {sorted(ends)}, which no template knows")
        elif _is_action(body[-1]):
            self.head = "deterministic"
            self._output(self._chain(x, body), "action")
        else:
            out = self._chain(x, body)
            columns = int(_kernel(body[-1]).shape[1])
            if not isinstance(self.action_space, DiscreteSpace) or columns != self.action_space.n:
                raise FormatError(f"ends in a layer of {columns} columns for the actions {self.action_space}")
            self.head = "q"
            self._output(out, "q")

    def _normal(self, x: str, ends: dict[str, Part]) -> None:
        means = ends["means_projection_layer"]
        scope = means.scope.rpartition("/")[0]
        here = {op.kind for op in self.operations if op.name.rpartition("/")[0] == scope}
        mean = self._chain(x, [means])
        if "Tanh" in here:
            mean = self._bounded(self.make.node("Tanh", [mean]))
        elif any(op.kind == "Tanh" and _root(op.name) not in self.networks for op in self.operations):
            if "stddev_projection_layer" not in ends:
                raise FormatError("squashes a normal distribution whose deviation does not depend on the observation")
            std = self._chain(x, [ends["stddev_projection_layer"]])
            self._squashed(mean, self._log_std(std, means.scope))
            return
        self._output(mean, "mean")
        bias = next((part for name, part in ends.items() if name.startswith("bias_layer")), None)
        if bias is None or bias.bias is None:
            self.notes["deviation"] = "of the action depends on the observation; no distribution here has that"
            return
        self.head = "gaussian"
        raw = bias.bias.double()
        if "Softplus" in here:
            raw = torch.log(torch.nn.functional.softplus(raw))
        elif "Exp" not in here:
            raw = torch.log(raw)
        self.log_std = tuple(raw.reshape(-1).tolist())

    def _squashed(self, mean: str, log_std: str) -> None:
        self.head = "squashed"
        bounds = [self.make.constant(bound, "float32") for bound in LOG_STD_BOUNDS]
        log_std = self.make.node("Clip", [log_std, *bounds])
        self._output(self.make.node("Concat", [mean, log_std], axis=1), "parameters")
        self._output(self.make.node("Tanh", [mean]), "action")

    def _log_std(self, x: str, layer: str) -> str:
        """Logarithm of the deviation that a projection network makes of its layer."""
        scope = layer.rpartition("/")[0]
        kinds = {op.kind for op in self.operations if op.name.startswith(f"{scope}/")}
        if "Exp" in kinds:
            return x
        if "Softplus" in kinds:
            x = self.make.node("Softplus", [x])
        return self.make.node("Log", [x])

    def _half(self, x: str, start: int, stop: int) -> str:
        places = [self.make.constant([place]) for place in (start, stop, 1)]
        return self.make.node("Slice", [x, *places])

    def _bounded(self, x: str) -> str:
        if not isinstance(self.action_space, BoxSpace):
            raise FormatError(f"scales to the bounds of the actions {self.action_space}")
        low, high = (bound.reshape(-1).astype(np.float64) for bound in self.action_space.bounds())
        for op, value in (("Mul", (high - low) / 2), ("Add", (high + low) / 2)):
            x = self.make.node(op, [x, self.make.constant(value, "float32")])
        return x

    def _value(self, root: str, parts: list[Part], x: str) -> None:
        if not all(part.operations for part in parts) and not self.word:
            self.notes["value"] = (
                f"no stored function runs {root}, so its activation is not known; give activation= to bring it"
            )
            return
        self._output(self._chain(x, parts, self.word), "value")

    def _output(self, x: str, name: str) -> None:
        self.make.output(x, name, shape=("rows", None))


def _root(name: str) -> str:
    return name.partition("/")[0]


def _is_action(part: Part) -> bool:
    """The last layer of ActorNetwork."""
    return part.scope.endswith("/action") and any(op.kind == "Tanh" for op in part.operations)


def _kernel(part: Part) -> torch.Tensor:
    kernel = part.kernel
    if kernel is None or kernel.ndim not in (2, 4) or not kernel.dtype.is_floating_point or 0 in kernel.shape:
        shape = "no kernel" if kernel is None else f"a kernel {list(kernel.shape)}"
        raise FormatError(f"has the layer {part.scope} with {shape}; dense layers and convolutions are known")
    if part.bias is not None and list(part.bias.shape) != [kernel.shape[-1]]:
        raise FormatError(f"has the layer {part.scope} with a bias {list(part.bias.shape)}: damaged")
    return kernel


def _out_first(kernel: torch.Tensor) -> torch.Tensor:
    return (kernel.T if kernel.ndim == 2 else kernel.permute(3, 2, 0, 1)).contiguous()


def _window(part: Part) -> dict[str, Any]:
    found = [op.attributes for op in part.operations if op.kind == "Conv2D"]
    strides = found[0].get("strides") if found else None
    if not isinstance(strides, tuple) or len(strides) != 4 or found[0].get("data_format", "NHWC") != "NHWC":
        raise FormatError(f"has the layer {part.scope} whose convolution is not told, or not channels last")
    padding = found[0].get("padding")
    if padding not in ("SAME", "VALID"):
        raise FormatError(f"has the layer {part.scope} with the padding {padding!r}")
    return {"strides": list(strides[1:3]), "auto_pad": "SAME_UPPER" if padding == "SAME" else "VALID"}


def _activated(make: GraphBuilder, x: str, part: Part) -> str:
    found = [op for op in part.operations if op.kind not in (*LINEAR, *SHAPES, "Transpose")]
    if not found:
        return x
    op = found[0]
    if len(found) > 1 or op.kind not in WORDS or op.name.rpartition("/")[0] != part.scope:
        raise FormatError(f"has the operations {[op.kind for op in found][:4]} in {part.scope}; known: {sorted(WORDS)}")
    if op.kind == "LeakyRelu":
        alpha = op.attributes.get("alpha", 0.2)
        return make.node("LeakyRelu", [x], alpha=alpha if isinstance(alpha, float) else 0.2)
    return activation(make, x, WORDS[op.kind])
