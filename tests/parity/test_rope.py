"""Rotation frequencies against those that Transformers computes, each kind at several settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lockstep.layers.rotary import RopeConfig, frequencies

CASES: list[tuple[dict[str, Any], int, int]] = [
    ({"rope_type": "linear", "factor": 4.0}, 64, 4096),
    ({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 64, 131072),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 128, 131072),
    ({"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7}, 64, 4096),
    ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3, "beta_fast": 16.0, "truncate": False}, 96, 8192),
    ({"rope_type": "longrope", "original_max_position_embeddings": 4096, "factor": 8.0}, 16, 32768),
    ({"rope_type": "longrope", "original_max_position_embeddings": 4096, "factor": 8.0}, 16, 4096),
]


@pytest.mark.slow
@pytest.mark.parametrize(("parameters", "head_dim", "max_position"), CASES)
def test_frequencies(parameters: dict[str, Any], head_dim: int, max_position: int) -> None:
    parameters = {"rope_theta": 500_000.0, **parameters}
    if parameters["rope_type"] == "llama3":
        parameters["original_max_position_embeddings"] = 8192
    if parameters["rope_type"] == "longrope":
        parameters["short_factor"] = [1.0 + 0.1 * pair for pair in range(head_dim // 2)]
        parameters["long_factor"] = [2.0 + 0.7 * pair for pair in range(head_dim // 2)]
    ours = RopeConfig.read(parameters, theta=1e4, max_position=max_position)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=max_position,
        rope_parameters=dict(parameters),
    )
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    expected, factor = compute(config, "cpu", seq_len=max_position)
    got, got_factor = frequencies(ours, head_dim, max_position)
    assert torch.allclose(got, expected, rtol=1e-6, atol=0)
    assert got_factor == pytest.approx(factor, rel=1e-12)
