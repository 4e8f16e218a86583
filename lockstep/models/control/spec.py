"""What a control policy is made of, as plain frozen data: this is what `config.json` of a policy folder holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from lockstep.core.errors import ConfigError
from lockstep.core.spaces import Space, space_from_json, space_to_json
from lockstep.layers.linear import Activation, ComputeDtype

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

    def to_json(self) -> dict[str, Any]:
        """JSON form, inverse of `from_json`."""
        data = asdict(self)
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
        if values.get("support") is not None:
            values["support"] = tuple(values["support"])
        return PolicySpec(**values)
