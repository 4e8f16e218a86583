from __future__ import annotations

import pytest

from lockstep.engine import sampler
from tests.engine import fake


@pytest.fixture
def fast_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws whose cost does not hide the engine's: thousands of steps a second."""
    monkeypatch.setattr(sampler, "sample_tokens", fake.fast_sample_tokens)
    monkeypatch.setattr(sampler, "token_logprobs", fake.fast_token_logprobs)
