"""Rope scaling between Hugging Face's dicts and GGUF's keys, and Llama 3's factors, which GGUF keeps as a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import FormatError, InputError

TENSOR = "rope_freqs.weight"

_YARN = (
    ("original_context_length", "original_max_position_embeddings"),
    ("yarn_ext_factor", "extrapolation_factor"),
    ("yarn_beta_fast", "beta_fast"),
    ("yarn_beta_slow", "beta_slow"),
)


def parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters of a config of either generation: `rope_theta` and, if there is scaling, its dict's keys."""
    merged: dict[str, Any] = {"rope_theta": config.get("rope_theta", 10000.0)}
    nested = config.get("rope_parameters") or {}
    if "full_attention" in nested:
        merged["rope_local_base_freq"] = (nested.get("sliding_attention") or {}).get("rope_theta", 10000.0)
        nested = nested["full_attention"]
    merged.update({key: value for key, value in (config.get("rope_scaling") or {}).items() if value is not None})
    merged.update({key: value for key, value in nested.items() if value is not None})
    merged["rope_type"] = merged.get("rope_type", merged.pop("type", "default"))
    return merged


def to_fields(rope: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """GGUF keys (after the architecture) for scaled rope; Llama 3's needs `llama3_factors` as a tensor instead.

    Raises:
        InputError: a kind of scaling that GGUF cannot say.
    """
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):
        return {}
    if kind not in ("linear", "yarn"):
        raise InputError(
            f"rope scaling {kind!r} cannot be written to GGUF; known: linear, yarn, llama3", field="rope_type"
        )
    fields: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        for gguf_key, hf_key in _YARN:
            if hf_key in rope:
                value = rope[hf_key]
                fields[f"rope.scaling.{gguf_key}"] = int(value) if "context" in gguf_key else float(value)
        if "attention_factor" in rope:
            fields["rope.scaling.yarn_attn_factor"] = float(rope["attention_factor"])
        if arch == "deepseek2" and "mscale_all_dim" in rope:
            # A tenth, because the reader multiplies it with a logarithm whose own factor is a tenth.
            fields["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
    return fields


def from_fields(fields: Mapping[str, Any], arch: str, path: str) -> dict[str, Any] | None:
    """The Hugging Face `rope_scaling` dict behind GGUF keys (given without the architecture), None if not scaled.

    Raises:
        FormatError: a kind of scaling that is not known here.
    """
    kind = fields.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise FormatError(f"{arch}.rope.scaling.type is {kind!r}; known: none, linear, yarn", path=path)
    scaling: dict[str, Any] = {"rope_type": kind, "factor": fields.get("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        for gguf_key, hf_key in _YARN:
            if f"rope.scaling.{gguf_key}" in fields:
                scaling[hf_key] = fields[f"rope.scaling.{gguf_key}"]
        attention = fields.get("rope.scaling.yarn_attn_factor", fields.get("rope.scaling.attn_factor"))
        if attention is not None:
            scaling["attention_factor"] = attention
        log_multiplier = fields.get("rope.scaling.yarn_log_multiplier")
        if log_multiplier is not None:
            scaling["mscale"] = scaling["mscale_all_dim"] = round(log_multiplier / 0.1, 6)
    return scaling


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """What each rotary frequency is divided by, float32 [head_dim / 2]: 1 for the fast ones, `factor` for the slow ones."""
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    out = np.ones(head_dim // 2, np.float64)
    for index, wavelength in enumerate(_wavelengths(rope["rope_theta"], head_dim)):
        turns = old / wavelength
        if turns < low:
            out[index] = factor
        elif turns <= high:
            smooth = (turns - low) / (high - low)
            out[index] = 1 / ((1 - smooth) / factor + smooth)
    return out.astype(np.float32)


def llama3_parameters(factors: NDArray[np.float32], theta: float, path: str) -> dict[str, Any]:
    """A Llama 3 `rope_scaling` dict that gives these factors; of several that do, Meta's usual one.

    Only `original / low` and `original / high` can be told from the factors, so `original` is taken as 8192.

    Raises:
        FormatError: no such dict gives them.
    """
    head_dim = 2 * len(factors)
    factor = float(factors.max(initial=1.0))
    base = {"rope_type": "llama3", "factor": round(factor, 4), "original_max_position_embeddings": 8192}
    for low, high in ((1.0, 4.0), *_fitted_borders(factors, factor, theta)):
        guess = {**base, "low_freq_factor": low, "high_freq_factor": high}
        if np.allclose(llama3_factors({**guess, "rope_theta": theta}, head_dim), factors, rtol=1e-4, atol=0):
            return guess
    raise FormatError(f"{TENSOR} does not follow Llama 3's rule; its frequencies cannot be expressed", path=path)


def _wavelengths(theta: float, head_dim: int) -> list[float]:
    return [2 * math.pi * theta ** (2 * index / head_dim) for index in range(head_dim // 2)]


def _fitted_borders(factors: NDArray[np.float32], factor: float, theta: float) -> list[tuple[float, float]]:
    """Candidates for (low, high) from the factors between 1 and `factor`: smooth is linear in the number of turns."""
    turns = 8192 / np.array(_wavelengths(theta, 2 * len(factors)))
    middle = (factors > 1 + 1e-5) & (factors < factor * (1 - 1e-5))
    if not factor > 1 or not np.isfinite(factors).all():
        return []
    if middle.sum() >= 2:
        smooth = (1 / factors[middle].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        slope, at_zero = np.polyfit(turns[middle], smooth, 1)
        low, high = -at_zero / slope, (1 - at_zero) / slope
        return [(round(low, 3), round(high, 3)), (low, high)]
    if middle.sum() == 1:
        only = float(((1 / factors[middle] - 1 / factor) / (1 - 1 / factor))[0])
        border = float(turns[middle][0]) / (1 + 3 * only)
        return [(border, 4 * border)]
    slow, fast = turns[factors > 1], turns[factors <= 1]
    border = math.sqrt(float(slow.max(initial=turns.min())) * float(fast.min(initial=turns.max())))
    return [(border, border * 1.0001)]
