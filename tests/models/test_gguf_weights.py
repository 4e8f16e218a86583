"""Quantised files of every family through the kernels: near the numbers the blocks stand for, in the format of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.interop.gguf import GGUFSource, save_gguf
from lockstep.layers.projection import Projection
from lockstep.models.dict_source import DictSource
from lockstep.models.families import build_model, hf_tensors, load_model
from lockstep.models.language import LanguageModel

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 8},
}


def hidden_states(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        cache = model.new_cache(2)
        hidden = model(ForwardBatch.packed([torch.arange(20)]), cache)
        return torch.cat([hidden, model.logits(hidden)], dim=1)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_runs_in_its_own_format(family: str, kind: str, tmp_path: Path) -> None:
    config = SIZES | FAMILIES[family]
    tensors = hf_tensors(build_model(config, seed=1), config)
    save_gguf(tmp_path / "m.gguf", DictSource(tensors, config), kind)
    source = GGUFSource.open(tmp_path / "m.gguf")
    model = load_model(source, "fp32")
    # The same numbers as plain floats: what remains is the rounding of the rows.
    plain = DictSource({name: source.tensor(name) for name in source.names()}, source.config())
    exact, got = hidden_states(load_model(plain, "fp32")), hidden_states(model)
    error = float((got - exact).norm() / exact.norm())
    if kind == "F32":
        assert error == 0.0
    else:
        assert 0 < error < 0.03
        formats = {one.format for m in model.modules() if isinstance(m, Projection) for one in m.packs()}
        assert formats == {"int4" if kind == "Q4_0" else "int8"}
