"""Kernel tests run on one thread and with every fresh tensor poisoned, so that an element left unwritten shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lockstep.kernels import native


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # In this mode torch fills what torch.empty returns with NaN. Its public name would tell the compiler too, and import
    # it: seconds.
    torch._C._set_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch._C._set_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_num_threads(before)


def runnable_levels() -> list[int]:
    return list(range(native.open_level(0).ls_cpu_level() + 1)) if native.state.library is not None else []


@pytest.fixture(params=runnable_levels(), ids=lambda level: native.LEVELS[level])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every build that this processor can run, one after another."""
    before = native.state.library
    native.state.library = native.open_level(request.param)
    yield request.param
    native.state.library = before
