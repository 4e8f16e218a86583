"""From a Hugging Face architecture to a model: the only place where a string from outside becomes a class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.core.errors import ConfigError, FormatError, unknown_name
from lockstep.core.tensors import TensorSource
from lockstep.layers.embedding import Embedding
from lockstep.layers.low_rank import name_matrices
from lockstep.layers.moe import ExpertProjection
from lockstep.layers.projection import Precision, Projection
from lockstep.layers.stack import DecoderLayers
from lockstep.models.deepseek_v3 import FAMILY as DEEPSEEK_V3
from lockstep.models.family import Family
from lockstep.models.gemma2 import FAMILY as GEMMA2
from lockstep.models.gemma3 import FAMILY as GEMMA3
from lockstep.models.gpt2 import FAMILY as GPT2
from lockstep.models.language import LanguageModel
from lockstep.models.llama import FAMILY as LLAMA
from lockstep.models.mixtral import FAMILY as MIXTRAL
from lockstep.models.qwen2 import FAMILY as QWEN2
from lockstep.models.qwen3 import FAMILY as QWEN3
from lockstep.models.qwen3_moe import FAMILY as QWEN3_MOE
from lockstep.models.weight_table import WeightTable, load_weights, save_weights, tie

ARCHITECTURES: dict[str, Family] = {
    "AquilaForCausalLM": LLAMA,
    "AquilaModel": LLAMA,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "GPT2LMHeadModel": GPT2,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "InternLM3ForCausalLM": LLAMA,
    "InternLMForCausalLM": LLAMA,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "YiForCausalLM": LLAMA,
}
"""Name in config.json -> family."""

_BY_NAME: dict[str, Family] = {
    "deepseek_v3": DEEPSEEK_V3,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}
"""`ModelFacts.family` -> family."""

PUBLISHED: dict[str, dict[str, Any]] = {
    name: config for family in ARCHITECTURES.values() for name, config in family.published.items()
}
"""Released models by name: what of their config.json decides the computation."""


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
    if str(names[0]).endswith("ForSequenceClassification"):
        raise ConfigError(
            f"{names[0]} rates texts and writes none, as a reward model does; a model that writes is expected here"
        )
    raise ConfigError(unknown_name("architecture", str(names[0]), ARCHITECTURES))


def table_of(model: LanguageModel) -> WeightTable:
    """Names of the tensors of a checkpoint of this model."""
    return _BY_NAME[model.facts.family].table(model.config)


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
    precision = Precision.of(compute, trainable=trainable, group=group)
    _check_held(family.sizes(config).total, source)
    model = family.build(config, precision)
    load_weights(model, family.table(config), source)
    name_matrices(model)
    return model.requires_grad_(trainable).train(trainable)


def _check_held(num_weights: int, source: TensorSource) -> None:
    """A config.json that was edited or damaged may ask for any amount of memory and time before the first tensor is looked
    at; what is a little off is told by the tensor."""
    held = sum(math.prod(source.shape(name)) for name in source.names())
    if num_weights > 4 * held:
        raise FormatError(
            f"the config describes a model of {num_weights:,} weights and the checkpoint holds {held:,}: one of them is "
            "damaged, incomplete or another model's"
        )


def model_like(model: LanguageModel, source: TensorSource) -> LanguageModel:
    """A model of the same sizes and precision with the weights of `source`, in memory of its own: an update that is whole
    before anybody sees it.

    Raises:
        ConfigError: the source's config.json, if it has one, describes another model.
        FormatError: tensors are missing, mis-shaped, unexpected or not finite.
    """
    family, values = _BY_NAME[model.facts.family], source.config()
    if values and (family_of(values) is not family or family.read_config(values) != model.config):
        raise ConfigError(f"the update's config.json describes another model than the {model.facts.family} here")
    trainable = model.precision.master is not None
    other = family.build(model.config, model.precision)
    load_weights(other, table_of(model), _Owned(source))
    name_matrices(other)
    return other.requires_grad_(trainable).train(model.training)


def current_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The model's tensors under their Hugging Face names, as `hf_tensors`, of a model whose numbers they are exactly.

    Raises:
        ConfigError: quantised matrices, which quantising anew may change.
    """
    for path, module in model.named_modules():
        if isinstance(module, Projection | ExpertProjection):
            packs = module.packs() if isinstance(module, Projection) else module.packed()
            if any(packed.quantised for packed in packs):
                raise ConfigError(f"{path} is quantised; give all tensors of the model, not some")
    return save_weights(model, table_of(model))


class _Owned:
    """A source whose tensors are copies, so that what is written over the file later changes nothing, and finite."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.config, self.generation_config, self.tokenizer = source.config, source.generation_config, source.tokenizer
        self.names, self.shape, self.quantised = source.names, source.shape, source.quantised

    def tensor(self, name: str) -> Tensor:
        """A copy."""
        found = self._source.tensor(name).clone()
        if not bool(torch.isfinite(found).all()):
            raise FormatError(f"tensor {name!r} holds NaN or infinity")
        return found


def stored_dtype(values: Mapping[str, Any], source: TensorSource) -> str:
    """ "bf16" where the checkpoint's numbers have 16 bits or fewer, else "fp32"."""
    named = str(values.get("dtype") or values.get("torch_dtype") or "")
    if named:
        return "fp32" if named in ("float32", "float64") else "bf16"
    halves = (torch.bfloat16, torch.float16)
    for name in source.names()[:1]:
        if source.quantised(name) is None and source.tensor(name).dtype in halves:
            return "bf16"
    return "fp32"


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
    name_matrices(model)
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
        elif isinstance(module, DecoderLayers):
            module.forget()
