"""The gate: every node case of the onnx package that passed once, passes. `node_cases.py` says how the list grows."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx")

from tests.interop.onnx.node_cases import cases, failure, frozen

GATE = 1_300


@pytest.mark.slow
def test_every_case_of_the_frozen_list_passes() -> None:
    known, listed = cases(), frozen()
    assert len(listed) >= GATE
    assert [name for name in listed if name not in known] == []
    assert {name: reason for name in listed if (reason := failure(name))} == {}
