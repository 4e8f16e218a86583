"""What a control policy is made of, as plain frozen data: this is what `config.json` of a policy folder holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from lockstep.core.errors import ConfigError
from lockstep.core.spaces import Space, space_from_json, space_to_json
from lockstep.layers.linear import Activation, ComputeDtype
from lockstep.models.graph.graph import Graph
from lockstep.models.graph.module import GraphModule
from lockstep.models.graph.states import Slot

HeadKind = Literal["categorical", "gaussian", "squashed", "deterministic", "q"]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network of a policy.

    >>> NetworkConfig(hidden_sizes=(256, 256), activation="relu").hidden_sizes
    (256, 256)
    """

    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the dense hidden layers of actor and critic, each of its own."""
    activation: Activation = "tanh"
    """Activation after each hidden layer."""
    encoder: Literal["auto", "nature_cnn", "impala_cnn", "small_cnn"] = "auto"
    """Image encoder; auto takes nature_cnn for images of 36 pixels or more, else small_cnn."""
    encoder_size: int = 512
    """Features that the image encoder yields."""
    recurrent: Literal["none", "lstm", "gru"] = "none"
    """Recurrent core between encoder and heads."""
    recurrent_size: int = 64
    """Hidden units of the recurrent core."""
    init: Literal["orthogonal", "uniform"] = "orthogonal"
    """Initial weights: orthogonal (PPO, A2C) or uniform in ±1/sqrt(in) (the default of dense layers in PyTorch)."""
    compute_dtype: ComputeDtype = "fp32"
    """Operand precision of matrix products; bf16 is 2-4x faster where arithmetic dominates. Sums are fp32 either way."""
    imported: str = ""
    """File or folder of another framework's network (ONNX, Caffe, ...; see lockstep import): it takes the encoder's place, and
    that of the actor where an output of it has the columns that the actions need."""
    imported_role: Literal["auto", "policy", "encoder"] = "auto"
    """The imported network gives the action distribution (policy), or features for dense layers of ours (encoder)."""
    imported_output: str = ""
    """Its output to use (empty: the first that fits)."""


@dataclass(frozen=True, kw_only=True)
class ImportedNetwork:
    """A network of another framework and its part in a policy. `module` has the weights it came with."""

    graph: Graph
    role: Literal["policy", "encoder"]
    output: str
    """Value of the graph that the policy goes on with."""
    size: int
    """Its columns."""
    value: str = ""
    """Value of the graph that is the state's value; empty: none."""
    states: tuple[Slot, ...] = ()
    """What a recurrent network carries from step to step."""
    module: GraphModule | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """JSON form without the weights."""
        return {
            "graph": self.graph.to_json(),
            "role": self.role,
            "output": self.output,
            "size": self.size,
            "value": self.value,
            "states": [[slot.input, slot.output, slot.size] for slot in self.states],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> ImportedNetwork:
        """Inverse of `to_json`.

        Raises:
            FormatError, TypeError: it is not one.
        """
        states = tuple(Slot(*slot) for slot in data["states"])
        return ImportedNetwork(**{**data, "graph": Graph.from_json(data["graph"]), "states": states})


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """Everything needed to build a policy's module; a folder's `config.json` is this and its version."""

    obs_space: Space
    action_space: Space
    head: HeadKind
    network: NetworkConfig = field(default_factory=NetworkConfig)
    critic: bool = True
    normalise_obs: bool = False
    obs_clip: float = 10.0
    frame_stack: int = 1
    log_std_init: float = 0.0
    dueling: bool = False
    noisy: bool = False
    num_atoms: int = 1
    support: tuple[float, float] | None = None
    imported: ImportedNetwork | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON form, inverse of `from_json`."""
        data = asdict(replace(self, imported=None))
        if self.imported is None:
            del data["imported"]
        else:
            data["imported"] = self.imported.to_json()
        data["obs_space"] = space_to_json(self.obs_space)
        data["action_space"] = space_to_json(self.action_space)
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> PolicySpec:
        """Build from `to_json`'s form.

        Raises:
            ConfigError: unknown or missing fields.
        """
        known = {f.name for f in fields(PolicySpec)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(f"policy config has unknown fields {unknown}; known: {sorted(known)}")
        missing = [name for name in ("obs_space", "action_space", "head") if name not in data]
        if missing:
            raise ConfigError(f"policy config lacks {missing}")
        values = dict(data)
        values["obs_space"] = space_from_json(data["obs_space"])
        values["action_space"] = space_from_json(data["action_space"])
        network = dict(data.get("network", {}))
        if "hidden_sizes" in network:
            network["hidden_sizes"] = tuple(network["hidden_sizes"])
        try:
            values["network"] = NetworkConfig(**network)
        except TypeError as error:
            raise ConfigError(f"policy config, network: {error}") from error
        if values.get("imported") is not None:
            values["imported"] = ImportedNetwork.from_json(values["imported"])
        if values.get("support") is not None:
            values["support"] = tuple(values["support"])
        return PolicySpec(**values)
