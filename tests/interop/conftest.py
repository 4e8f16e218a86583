"""The policies of tests/models/control/test_policy.py, under the name `cases`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lockstep.models.control.policy import Policy

SOURCE = Path(__file__).resolve().parents[1] / "models" / "control" / "test_policy.py"


@pytest.fixture(scope="session")
def cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("policy_cases", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def policy(cases: ModuleType, request: pytest.FixtureRequest) -> Policy:
    """The policy that the test's `policy` parameter names, or a normalised dense one."""
    name = request.param if "param" in request.__dict__ else "mlp-normalised"
    made: Policy = cases.make_policy(name)
    made.version = 7
    return made
