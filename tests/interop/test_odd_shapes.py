"""Shapes and types that a tracer trips over: one action dimension, none, matrices, integer masks, float64, bf16, frames."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace
from lockstep.interop import export_onnx, export_torch
from lockstep.interop.check import tolerance_of
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec

VECTOR = BoxSpace((3,), "float32")
FRAME = BoxSpace((84, 84), "uint8", (0.0,), (255.0,))
BF16 = NetworkConfig(hidden_sizes=(256, 256), activation="relu", init="uniform", compute_dtype="bf16")

SPECS = {
    "one action": PolicySpec(
        obs_space=VECTOR, action_space=BoxSpace((1,), "float32", (-2.0,), (2.0,)), head="squashed", critic=False
    ),
    "scalar action": PolicySpec(
        obs_space=VECTOR, action_space=BoxSpace((), "float32", (-2.0,), (2.0,)), head="gaussian"
    ),
    "matrices": PolicySpec(
        obs_space=BoxSpace((2, 3), "float32"),
        action_space=BoxSpace((2, 2), "float32", (-1.0,), (1.0,)),
        head="gaussian",
        normalise_obs=True,
    ),
    "integer mask": PolicySpec(
        obs_space=DictSpace({"cell": DiscreteSpace(5), "action_mask": BoxSpace((5,), "int8", (0.0,), (1.0,))}),
        action_space=MultiDiscreteSpace((3, 2)),
        head="categorical",
    ),
    "choices not from zero": PolicySpec(
        obs_space=DictSpace({"cell": DiscreteSpace(5, -2), "pair": MultiDiscreteSpace((3, 4), (1, 0))}),
        action_space=MultiDiscreteSpace((3, 2), (7, -1)),
        head="categorical",
    ),
    "single choice": PolicySpec(
        obs_space=MultiDiscreteSpace((3, 4)), action_space=DiscreteSpace(1), head="categorical"
    ),
    "float64, bf16": PolicySpec(
        obs_space=BoxSpace((17,), "float64"),
        action_space=BoxSpace((6,), "float32", (-1.0,), (1.0,)),
        head="squashed",
        critic=False,
        network=BF16,
    ),
    "stacked frames, bf16": PolicySpec(
        obs_space=FRAME,
        action_space=DiscreteSpace(6),
        head="q",
        critic=False,
        dueling=True,
        frame_stack=4,
        network=NetworkConfig(hidden_sizes=(), encoder_size=64, compute_dtype="bf16"),
    ),
    "silu, gru": PolicySpec(
        obs_space=VECTOR,
        action_space=DiscreteSpace(2),
        head="categorical",
        network=NetworkConfig(activation="silu", recurrent="gru"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_exports_agree(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    policy = Policy(SPECS[name], seed=1)
    assert all(d.absolute == 0.0 for d in export_torch(policy, tmp_path / "exact.pt2", distribution=True))
    bound = tolerance_of(policy)
    for deviations in (
        export_torch(policy, tmp_path / "portable.pt2", portable=True),
        export_onnx(policy, tmp_path / "p.onnx", distribution=True),
    ):
        assert deviations[0].name == "action"
        assert all(d.relative <= bound for d in deviations if d.name != "action")
