"""From a Hugging Face architecture to a model: the only place where a string from outside becomes a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.core.shards import ShardSpec
from lockstep.core.tensors import TensorSource
from lockstep.layers.embedding import Embedding
from lockstep.layers.moe import ExpertProjection
from lockstep.layers.projection import Precision, Projection
from lockstep.models.language import LanguageModel
from lockstep.models.llama import model as llama_model
from lockstep.models.llama import sharding as llama_sharding
from lockstep.models.llama import sizes as llama_sizes
from lockstep.models.llama import weights as llama_weights
from lockstep.models.sizes import ModelSizes
from lockstep.models.weight_table import WeightTable, load_weights, save_weights, tie


@dataclass(frozen=True)
class Family:
    """The four files of a family's folder."""

    read_config: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, Precision], LanguageModel]
    table: Callable[[Any], WeightTable]
    sizes: Callable[[Any], ModelSizes]
    shards: Callable[[Any], dict[str, ShardSpec]]


LLAMA = Family(
    llama_weights.read_config, llama_model.Llama, llama_weights.table, llama_sizes.sizes, llama_sharding.shards
)

ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "AquilaForCausalLM": LLAMA,
    "AquilaModel": LLAMA,
    "YiForCausalLM": LLAMA,
    "InternLMForCausalLM": LLAMA,
    "InternLM3ForCausalLM": LLAMA,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family a config.json names in `architectures`.

    Raises:
        ConfigError: no architecture, or one we do not have.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise ConfigError(f"config.json has architectures={names!r}; expected a list such as ['LlamaForCausalLM']")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ConfigError(unknown_name("architecture", str(names[0]), ARCHITECTURES))


def load_model(source: TensorSource, dtype: str = "auto", *, trainable: bool = False, group: int = 32) -> LanguageModel:
    """A model with the weights of `source`.

    Args:
        dtype: "fp32", "bf16", "int8", "int4", or "auto": bf16 where the checkpoint is in half precision, else fp32.
            Quantised tensors of the file stay in their format unless the model is trainable.
        trainable: keep float32 weights beside the packed ones, for an optimiser.
        group: columns that share a scale in int8 and int4.

    Raises:
        ConfigError: config.json asks for something we do not have.
        FormatError: tensors are missing, mis-shaped or unexpected.
    """
    values = source.config()
    family = family_of(values)
    config = family.read_config(values)
    compute = stored_dtype(values, source) if dtype == "auto" else dtype
    model = family.build(config, Precision.of(compute, trainable=trainable, group=group))
    load_weights(model, family.table(config), source)
    return model.requires_grad_(trainable).train(trainable)


def stored_dtype(values: Mapping[str, Any], source: TensorSource) -> str:
    """ "bf16" where the checkpoint's numbers have 16 bits or fewer, else "fp32"."""
    named = str(values.get("dtype") or values.get("torch_dtype") or "")
    if named:
        return "fp32" if named in ("float32", "float64") else "bf16"
    halves = (torch.bfloat16, torch.float16)
    return "bf16" if any(source.tensor(name).dtype in halves for name in source.names()[:1]) else "fp32"


def build_model(
    config: Mapping[str, Any], seed: int, dtype: str = "fp32", *, trainable: bool = True, group: int = 32
) -> LanguageModel:
    """A model of the architecture and sizes of a config.json, with random weights.

    Matrices are normal with the config's `initializer_range`, biases zero, norms one.
    """
    family = family_of(config)
    parsed = family.read_config(config)
    model = family.build(parsed, Precision.of(dtype, trainable=trainable, group=group))
    generator = torch.Generator().manual_seed(seed)
    std = float(config.get("initializer_range", 0.02))
    for name, module in model.named_modules():
        if isinstance(module, Projection | ExpertProjection | Embedding) and not (model.tied and name == "head"):
            module.fill_random(generator, std)
    tie(model)
    return model.requires_grad_(trainable).train(trainable)


def hf_tensors(model: LanguageModel, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's tensors under their Hugging Face names; `config` is the config.json it was built from."""
    family = family_of(config)
    return save_weights(model, family.table(family.read_config(config)), dtype)


def repack(model: nn.Module) -> None:
    """Weights were written through `.data` or a pointer, which torch does not see: pack them at the next product."""
    for module in model.modules():
        if isinstance(module, Projection | ExpertProjection):
            module.repack()
