"""Checkpoints of CleanRL (`.cleanrl_model`): which script wrote one is told by the names of its weights.

ppo.py: actor, critic (tanh). ppo_continuous_action.py: actor_mean, actor_logstd, critic (tanh). ppo_atari*.py: network (ReLU,
images / 255), actor, critic. dqn*.py: network (ReLU). c51*.py: network (ReLU), atoms. ddpg and td3: a tuple of
actor (fc1, fc2, fc_mu) and critics.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lockstep.core.errors import FormatError
from lockstep.interop.chains import Layer, chain, image_layout, layers_of
from lockstep.interop.pytorch.reader import INPUT, log_std_of
from lockstep.interop.pytorch.state import read_state
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About
from lockstep.models.graph.module import GraphModule


def read_cleanrl(path: Path) -> GraphModule:
    """Read what CleanRL's `--save-model` wrote.

    Raises:
        FormatError: damaged, or of a script that has no template here.
    """
    path = Path(path)
    tensors = read_state(path)
    try:
        return _build(tensors)
    except FormatError as error:
        raise FormatError(error.reason, path=str(path), op=error.op) from error


def _build(tensors: dict[str, torch.Tensor]) -> GraphModule:
    make = GraphBuilder()
    kinds = {name.split(".")[0] for name in tensors}
    if "0.fc_mu.weight" in tensors:
        tensors = {name.removeprefix("0."): value for name, value in tensors.items() if name.startswith("0.")}
        return _deterministic(make, tensors)
    trunk = layers_of(tensors, "network.")
    if trunk and "actor" in kinds:
        x = _input(make, trunk)
        x = chain(make, x, trunk, "relu", last="relu")
        make.output(chain(make, x, layers_of(tensors, "actor."), "none"), "logits", shape=("rows", None))
        make.output(chain(make, x, layers_of(tensors, "critic."), "none"), "value", shape=("rows", 1))
        return make.build(about=_about("categorical", trunk))
    if trunk and kinds <= {"network", "atoms", "n"}:
        atoms = tensors.get("atoms")
        out = chain(make, _input(make, trunk), trunk, "relu")
        if atoms is not None:
            out = _expectation(make, out, atoms)
        make.output(out, "q", shape=("rows", None))
        return make.build(about=_about("q", trunk))
    actor = next((name for name in ("actor", "actor_mean") if name in kinds), "")
    if not actor or "critic" not in kinds:
        raise FormatError(f"of no script of CleanRL that is known here: its weights are {sorted(tensors)[:6]}")
    layers = layers_of(tensors, f"{actor}.")
    x = _input(make, layers)
    head = "categorical" if actor == "actor" else "gaussian"
    make.output(chain(make, x, layers, "tanh"), "logits" if actor == "actor" else "mean", shape=("rows", None))
    make.output(chain(make, x, layers_of(tensors, "critic."), "tanh"), "value", shape=("rows", 1))
    return make.build(about=_about(head, layers, log_std_of(tensors)))


def _input(make: GraphBuilder, layers: list[Layer]) -> str:
    if not layers:
        raise FormatError("has no layers where CleanRL keeps them")
    x = make.input(INPUT, shape=image_layout(layers))
    return make.node("Div", [x, make.constant(255.0, "float32")]) if layers[0].weight.ndim == 4 else x


def _about(head: str, layers: list[Layer], log_std: tuple[float, ...] = ()) -> About:
    layout = "NCHW" if layers[0].weight.ndim == 4 else ""
    return About(format="cleanrl", producer="cleanrl", head=head, log_std=log_std, layout=layout)  # type: ignore[arg-type]


def _expectation(make: GraphBuilder, out: str, atoms: torch.Tensor) -> str:
    """Expected values [N, n] from the logits [N, n * Z] of return distributions on `atoms` (Bellemare et al. 2017)."""
    shape = make.constant([0, -1, atoms.numel()])
    probabilities = make.node("Softmax", [make.node("Reshape", [out, shape])], axis=2)
    support = make.tensor("atoms", atoms.reshape(-1).to(torch.float32), trainable=False)
    weighted = make.node("Mul", [probabilities, support])
    return make.node("ReduceSum", [weighted, make.constant([2])], keepdims=0)


def _deterministic(make: GraphBuilder, tensors: dict[str, torch.Tensor]) -> GraphModule:
    layers = [*layers_of(tensors, "fc1."), *layers_of(tensors, "fc2."), *layers_of(tensors, "fc_mu.")]
    out = chain(make, _input(make, layers), layers, "relu", last="tanh")
    make.output(out, "action", shape=("rows", None))
    notes: dict[str, str] = {
        str(key): str(tensors[key].reshape(-1).tolist()) for key in ("action_scale", "action_bias") if key in tensors
    }
    return make.build(about=About(format="cleanrl", producer="cleanrl", head="deterministic", notes=notes))
