"""Vocabularies of the shared fixtures as pytest fixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lockstep.tokenize.tokenizer import Tokenizer
from tests.tokenize.vocabularies import load, read_metadata, read_vectors


@pytest.fixture(scope="session")
def metadata_of() -> Callable[[str], dict[str, Any]]:
    """Metadata of a GGUF vocabulary by its short name ("gpt-2")."""
    return read_metadata


@pytest.fixture(scope="session")
def vocabulary_of() -> Callable[[str], Tokenizer]:
    """Tokenizer of a GGUF vocabulary by its short name."""
    return load


@pytest.fixture(scope="session")
def vectors_of() -> Callable[[str], list[tuple[str, list[int]]]]:
    """Texts and their ids, as the vocabulary's own implementation gave them."""
    return read_vectors
