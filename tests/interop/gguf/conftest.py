"""Tiny models of `families.py`, saved once a session."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

SOURCE = Path(__file__).with_name("families.py")


@pytest.fixture(scope="session")
def families() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_families", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(families: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """Folder and logits of a family's tiny model, by name."""
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(name: str) -> tuple[Path, torch.Tensor]:
        if name not in made:
            made[name] = (root / name, families.save_tiny(name, root / name))
        return made[name]

    return make
