"""A policy's deterministic decision as a function from named tensors to named tensors, which is what gets exported.

Legend: N rows, P distribution parameters, A action dimensions, H hidden units, F stacked frames.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace, Space
from lockstep.interop.layers import make_traceable
from lockstep.models.control.heads import Categorical, Gaussian, MultiCategorical, QValues, SquashedGaussian, masked
from lockstep.models.control.policy import Policy
from lockstep.models.control.preprocess import ACTION_MASK

FORMAT = "lockstep-export-1"
METADATA_KEY = "lockstep"
OBSERVATION, STARTS, STATE, NEXT_STATE = "observation", "starts", "state.", "next_state."

Exactness = Literal["exact", "portable"]


@dataclass(frozen=True)
class Port:
    """One input: name, NumPy dtype, shape of a row.

    >>> Port("observation", "float32", (4,)).zeros(2).shape
    (2, 4)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def zeros(self, num: int) -> np.ndarray:
        """[num, *shape]."""
        return np.zeros((num, *self.shape), self.dtype)


class PolicyProgram(nn.Module):
    """forward({name: tensor}) -> {name: tensor}, N rows each, N free.

    Inputs: `observation`, or one input per entry of a dictionary observation; for policies with state also `starts`
    (bool [N]: the row's observation begins an episode) and `state.NAME`.
    Outputs: `action` in the environment's form; `logprob` [N] where the head has a distribution; `value` [N] where
    there is a critic; with `distribution` its parameters (`logits`, `action_values`, or `mean` and `log_std`, in the
    coordinates of the head); `next_state.NAME`.

    Args:
        policy: copied.
        exactness: "exact" keeps our operators, "portable" uses only those of the tensor library.
        distribution: also yield the distribution's parameters.
    """

    def __init__(self, policy: Policy, *, exactness: Exactness, distribution: bool = False) -> None:
        super().__init__()
        self.exactness = exactness
        self.distribution = distribution
        self.policy = Policy(policy.spec)
        self.policy.load_state_dict(policy.state_dict())
        self.head = self.policy.head
        self.has_logprob = isinstance(self.head, Categorical | MultiCategorical | Gaussian | SquashedGaussian)
        self.has_value = self.policy.critic is not None
        self.state_names = tuple(self.policy.initial_state(1))
        self.inputs = inputs_of(policy)
        make_traceable(self.policy, portable=exactness == "portable")

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        policy = self.policy
        obs: Any = inputs
        if not isinstance(policy.spec.obs_space, DictSpace):
            obs = inputs[OBSERVATION]
        num = inputs[self.inputs[0].name].shape[0]
        state = {name: inputs[STATE + name] for name in self.state_names}
        starts = inputs[STARTS] if state else torch.zeros(num, dtype=torch.bool)
        step = policy.act(obs, state, starts, torch.zeros(num, 0), deterministic=True)
        out = {"action": step.env_action}
        if self.has_logprob:
            out["logprob"] = step.logprob
        if step.value is not None:
            out["value"] = step.value
        if self.distribution:
            out.update(distribution_of(policy, step.features, state, starts))
        out.update({NEXT_STATE + name: step.state[name] for name in self.state_names})
        # An output that is an input (a state handed through) has no form in some runtimes.
        return {name: x.clone() if any(x is y for y in inputs.values()) else x for name, x in out.items()}

    @property
    def output_names(self) -> list[str]:
        """In the order of `forward`."""
        names = ["action"]
        names += ["logprob"] * self.has_logprob + ["value"] * self.has_value
        if self.distribution:
            match self.head:
                case QValues():
                    names.append("action_values")
                case Gaussian() | SquashedGaussian():
                    names += ["mean", "log_std"]
                case Categorical() | MultiCategorical():
                    names.append("logits")
        return names + [NEXT_STATE + name for name in self.state_names]

    def trace(self) -> torch.export.ExportedProgram:
        """The program with a free number of rows."""
        example = {port.name: torch.from_numpy(port.zeros(3)) for port in self.inputs}
        rows = torch.export.Dim("rows", min=1)
        shapes = ({port.name: {0: rows} for port in self.inputs},)
        with torch.no_grad(), kernels.force("opaque" if self.exactness == "exact" else "traceable"):
            return torch.export.export(self.eval(), (example,), dynamic_shapes=shapes)

    def metadata(self, policy: Policy, kind: str) -> str:
        """JSON that travels in the file."""
        document = {
            "format": FORMAT,
            "kind": kind,
            "exactness": self.exactness,
            "version": policy.version,
            "digest": policy.digest(),
            "spec": policy.spec.to_json(),
            "inputs": [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in self.inputs],
            "outputs": self.output_names,
        }
        return json.dumps(document)


def distribution_of(policy: Policy, features: Any, state: dict[str, Tensor], starts_N: Tensor) -> dict[str, Tensor]:
    """Parameters of the action distribution by name, masked choices included, from network input."""
    params_NP = policy(features, state, starts_N)[0]
    mask = features[ACTION_MASK] if isinstance(features, dict) and ACTION_MASK in features else None
    match policy.head:
        case QValues():
            return {"action_values": masked(policy.head.values(params_NP), mask)}
        case Gaussian():
            return {"mean": params_NP, "log_std": policy.head.log_std.expand_as(params_NP).clone()}
        case SquashedGaussian():
            mean, log_std = policy.head.split(params_NP)
            return {"mean": mean, "log_std": log_std}
        case Categorical() | MultiCategorical():
            return {"logits": masked(params_NP, mask)}
        case _:
            return {}


def inputs_of(policy: Policy) -> tuple[Port, ...]:
    """Inputs of a policy's program, in order.

    Raises:
        ConfigError: an entry of a dictionary observation has the name of another input.
    """
    space = policy.spec.obs_space
    leaves = space.spaces if isinstance(space, DictSpace) else {OBSERVATION: space}
    ports = [_port(name, leaf) for name, leaf in leaves.items()]
    state = policy.initial_state(1)
    if state:
        ports.append(Port(STARTS, "bool", ()))
        ports += [Port(STATE + name, str(x.numpy().dtype), tuple(x.shape[1:])) for name, x in state.items()]
    names = [port.name for port in ports]
    clashes = sorted({name for name in names if names.count(name) > 1})
    if clashes:
        raise ConfigError(f"observation entries {clashes} have the names of other inputs; rename them in a wrapper")
    return tuple(ports)


def _port(name: str, space: Space) -> Port:
    match space:
        case BoxSpace():
            return Port(name, "float32" if space.dtype == "float64" else space.dtype, space.shape)
        case DiscreteSpace():
            return Port(name, "int64", ())
        case MultiDiscreteSpace():
            return Port(name, "int64", (len(space.nvec),))
    raise ConfigError(f"observation part {name!r}: {space} cannot be exported")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tracing and checking are many tiny calls; a second thread only makes them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
