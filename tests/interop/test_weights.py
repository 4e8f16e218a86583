"""One name, the right reader."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.core.errors import FormatError, InputError
from lockstep.interop.gguf import GGUFSource, TensorData, write_gguf
from lockstep.interop.hf import HFFolder, save_folder
from lockstep.interop.weights import open_weights


def test_the_right_reader(tmp_path: Path) -> None:
    save_folder(tmp_path / "folder", {"model_type": "llama"}, {"t": torch.ones(2)})
    assert isinstance(open_weights(tmp_path / "folder"), HFFolder)
    fields = {
        "general.architecture": "gpt2",
        "gpt2.block_count": 1,
        "gpt2.embedding_length": 32,
        "gpt2.attention.head_count": 2,
    }
    embedding = TensorData("F32", (4, 32), lambda: np.ones((4, 32), np.float32))
    path = tmp_path / "files" / "a.gguf"
    write_gguf(path, fields, {"token_embd.weight": embedding})
    for model in (path, str(path), path.parent):
        source = open_weights(model)
        assert isinstance(source, GGUFSource)
        assert source.names() == ["transformer.wte.weight"]
    shutil.copyfile(path, path.with_name("b.gguf"))
    with pytest.raises(InputError, match=r"2 GGUF files; name one, such as .*a\.gguf"):
        open_weights(path.parent)
    with pytest.raises(FormatError, match="does not exist"):
        open_weights(tmp_path / "c.gguf")
    with pytest.raises(InputError, match="does not exist"):
        open_weights("./nothing/here")
