"""Rotary position embedding (Su et al. 2021): the frequencies of its published extensions and tables of their angles.

Legend: P positions, R rotated pairs of a head, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError, InputError, unknown_name

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}
_OPTIONAL = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Which rotation. Fields that a kind does not use keep their defaults."""

    theta: float = 10_000.0
    kind: str = "default"
    partial: float = 1.0
    """Fraction of a head's dimensions that is rotated."""
    factor: float = 1.0
    original_max_position: int = 0
    """Positions of pre-training, before the extension."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @staticmethod
    def read(values: Mapping[str, Any] | None, *, theta: float, max_position: int) -> RopeConfig:
        """From `rope_scaling` or `rope_parameters` of a config.json; `theta` where they do not have one.

        Raises:
            ConfigError: unknown kind, unknown or missing key.
        """
        given = {key: value for key, value in (values or {}).items() if value is not None}
        kind = given.pop("rope_type", given.pop("type", "default"))
        given.pop("type", None)
        if kind not in KINDS:
            raise ConfigError(unknown_name("rope_type", str(kind), KINDS))
        theta = float(given.pop("rope_theta", theta))
        partial = float(given.pop("partial_rotary_factor", 1.0))
        if kind in ("llama3", "yarn", "longrope"):
            given.setdefault("original_max_position_embeddings", max_position)
        if kind in ("longrope", "yarn") and "factor" not in given:
            given["factor"] = max_position / given["original_max_position_embeddings"]
        for key in given:
            if key not in _KEYS[kind]:
                raise ConfigError(unknown_name(f"key of {kind} rope scaling", key, _KEYS[kind]))
        for key in _KEYS[kind]:
            if key not in given and key not in _OPTIONAL:
                raise ConfigError(f"{kind} rope scaling has no {key!r}; expected {', '.join(_KEYS[kind])}")
        if "original_max_position_embeddings" in given:
            given["original_max_position"] = int(given.pop("original_max_position_embeddings"))
        for key in ("short_factor", "long_factor"):
            if key in given:
                given[key] = tuple(float(number) for number in given[key])
        return RopeConfig(theta=theta, kind=kind, partial=partial, **given)


def frequencies(config: RopeConfig, head_dim: int, max_position: int) -> tuple[Tensor, float]:
    """Radians a position of each rotated pair [R] and the factor on cos and sin, as Transformers computes them.

    Two kinds change with the length of the sequence there, which would make cached keys stale; here they are fixed.
    "dynamic" is the plain rotation, exact up to `max_position`, which its models do not exceed. "longrope" takes the
    short factors up to `original_max_position` and the long ones for models that go beyond.
    """
    dim = int(head_dim * config.partial)
    base = config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    plain_R = 1.0 / base
    if config.kind in ("default", "dynamic"):
        return plain_R, 1.0
    if config.kind == "linear":
        return plain_R / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(config, plain_R), 1.0
    if config.kind == "yarn":
        return _yarn(config, base, dim)
    return _longrope(config, base, max_position)


def _llama3(config: RopeConfig, plain_R: Tensor) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    wavelength = 2 * math.pi / plain_R
    longest = config.original_max_position / config.low_freq_factor
    shortest = config.original_max_position / config.high_freq_factor
    scaled = torch.where(wavelength > longest, plain_R / config.factor, plain_R)
    smooth = (config.original_max_position / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    between = (1 - smooth) * scaled / config.factor + smooth * scaled
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, scaled)


def _yarn(config: RopeConfig, base: Tensor, dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): interpolation below `beta_slow` turns over the original context, none above `beta_fast`."""

    def dimension(turns: float) -> float:
        return dim * math.log(config.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    freq_R = 1.0 / (config.factor * base) * (1 - keep) + 1.0 / base * keep
    return freq_R, _yarn_attention(config)


def _yarn_attention(config: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)


def _longrope(config: RopeConfig, base: Tensor, max_position: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024): a searched factor for every pair."""
    factors = config.long_factor if max_position > config.original_max_position else config.short_factor
    if len(factors) != len(base):
        raise ConfigError(f"longrope has {len(factors)} factors; expected {len(base)}, one for each rotated pair")
    attention = config.attention_factor
    if attention is None:
        attention = 1.0
        if config.factor > 1.0:
            attention = math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_position))
    return 1.0 / (torch.tensor(factors) * base), attention


class RotaryTable:
    """cos and sin [P, R] of the positions seen so far, made longer when a batch reaches further.

    >>> table = RotaryTable(RopeConfig(), head_dim=4, max_position=64)
    >>> cos_PR, sin_PR = table.reach(3)
    >>> cos_PR.shape[1], cos_PR[0].tolist()
    (2, [1.0, 1.0])
    """

    def __init__(self, config: RopeConfig, head_dim: int, max_position: int) -> None:
        self.freq_R, self.factor = frequencies(config, head_dim, max_position)
        self.max_position = max_position
        self._cos_PR, self._sin_PR = torch.empty(0, len(self.freq_R)), torch.empty(0, len(self.freq_R))

    def reach(self, length: int) -> tuple[Tensor, Tensor]:
        """Tables of at least `length` positions.

        Raises:
            InputError: beyond `max_position`.
        """
        if length > self._cos_PR.shape[0]:
            if length > self.max_position:
                raise InputError(
                    f"a sequence has {length} tokens; the model's context holds {self.max_position}", field="positions"
                )
            longer = min(self.max_position, max(1024, 2 * length))
            angles_PR = torch.arange(longer, dtype=torch.float32)[:, None] * self.freq_R
            self._cos_PR, self._sin_PR = angles_PR.cos() * self.factor, angles_PR.sin() * self.factor
        return self._cos_PR, self._sin_PR
