"""Tiny random models of Transformers and the same weights in ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lockstep.models.dict_source import DictSource
from lockstep.models.families import load_model
from lockstep.models.language import LanguageModel

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}


@dataclass(frozen=True)
class Pair:
    """The reference, and its checkpoint as a file would hold it."""

    reference: Any
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def ours(self, dtype: str = "fp32", *, trainable: bool = False) -> LanguageModel:
        return load_model(DictSource(self.tensors, self.config), dtype, trainable=trainable)


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors under the names of a file, which are not always those in memory."""
    model.save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return json.loads((folder / "config.json").read_text()), tensors


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Pair]]:
    made: dict[str, Pair] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def make(kind: str, **changes: Any) -> Pair:
        key = repr((kind, sorted(changes.items())))
        if key not in made:
            torch.manual_seed(7)
            given = {name: value for name, value in (SIZES | changes).items() if value is not ...}
            transformers = pytest.importorskip("transformers")
            config = getattr(transformers, f"{kind}Config")(**given)
            reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                # Norm weights and biases start at one and zero, where a mistake could hide.
                for parameter in reference.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.2 * torch.randn_like(parameter))
                for name, buffer in reference.named_buffers():
                    if name.endswith("e_score_correction_bias"):
                        buffer.add_(0.3 * torch.randn_like(buffer))
            values, tensors = saved(reference, tmp_path_factory.mktemp("reference"))
            made[key] = Pair(reference, values, tensors)
        return made[key]

    yield make
    torch.set_num_threads(threads)
