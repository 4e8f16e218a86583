from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.interop.hf.save import save_folder
from lockstep.models.families import build_model, hf_tensors
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.training import train_tokenizer
from tests.learn.tiny import LLAMA


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer and a chat template of one token a role."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    words = tmp_path_factory.mktemp("words")
    train_tokenizer(["2 + 3 = 5", "yes or no", "the sum of"] * 3, 280, words)
    tokenizer = Tokenizer.from_folder(words)
    size = (tokenizer.vocab_size + 31) // 32 * 32
    config = {**LLAMA, "vocab_size": size, "initializer_range": 0.05, "eos_token_id": tokenizer.eos_ids[0]}
    save_folder(folder, config, hf_tensors(build_model(config, 3), config), tokenizer_from=words)
    return folder


def write_rows(path: Path, rows: list[object]) -> str:
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)
