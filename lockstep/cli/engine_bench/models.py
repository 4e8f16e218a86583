"""Model files with random weights for a bench: one file that both sides read, or two of the same numbers.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.interop.gguf.export import save_gguf
from lockstep.interop.hf.save import save_folder
from lockstep.models.dict_source import DictSource
from lockstep.models.families import PUBLISHED, build_model, family_of, hf_tensors

GGUF_KINDS = {"q4_0": "Q4_0", "q8_0": "Q8_0", "bf16": "BF16"}
VLLM_KINDS = ("bf16", "int8")
_NORMAL_TOKEN, _CONTROL_TOKEN = 1, 3


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a published architecture.

    Raises:
        ConfigError: unknown name.
    """
    if name not in PUBLISHED:
        raise ConfigError(unknown_name("architecture", name, PUBLISHED))
    family = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
    config = dict(PUBLISHED[name])
    architecture = config["architectures"][0]
    if architecture not in family:
        raise ConfigError(f"{name} is a {architecture}; the bench makes files of {', '.join(family)}")
    extra = {"model_type": family[architecture], "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16"}
    return {**extra, **config}


def weight_counts(name: str) -> dict[str, int]:
    """What a token is multiplied with: `layer_weights`, and `weights` with the output matrix."""
    config = config_of(name)
    family = family_of(config)
    sizes = family.sizes(family.read_config(config))
    return {"layer_weights": sizes.layers, "weights": sizes.layers + (sizes.head or sizes.embedding)}


def write_gguf_model(name: str, kind: str, path: Path) -> None:
    """All matrices in one format, the output matrix included; a byte-level vocabulary."""
    config = config_of(name)
    save_gguf(
        path,
        DictSource(_tensors(config), config),
        GGUF_KINDS[kind],
        tokenizer=_byte_vocabulary(config["vocab_size"]),
        name=f"random {name}",
    )


def write_folder_model(name: str, kind: str, path: Path) -> None:
    """A Hugging Face folder in bf16, or in the int8 form that vLLM reads ("compressed-tensors", W8A8: a scale for each
    output, activations rounded as they come; the output matrix stays bf16)."""
    config = config_of(name)
    tensors = _tensors(config)
    if kind == "bf16":
        save_folder(path, config, tensors)
        return
    whole = {"num_bits": 8, "type": "int", "symmetric": True}
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**whole, "strategy": "channel", "dynamic": False},
                "input_activations": {**whole, "strategy": "token", "dynamic": True},
            }
        },
    }
    save_folder(path, {**config, "quantization_config": quantisation}, _per_output_int8(tensors))


def _tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    model = build_model(config, 0, "bf16", trainable=False)
    return hf_tensors(model, config, torch.bfloat16)


def _per_output_int8(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight"):
            yield name, tensor
            continue
        scale_N1 = tensor.float().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127.0
        yield name, torch.round(tensor.float() / scale_N1).to(torch.int8)
        yield f"{name}_scale", scale_N1.to(torch.bfloat16)


def _byte_vocabulary(size: int) -> dict[str, Any]:
    """GPT-2's alphabet of bytes, then tokens of two and three letters with the merge that makes each, and two control tokens:
    as many tokens and merges as a real vocabulary has, so that reading them takes as long."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    num_merged = size - len(letters) - 2
    twos = [(left, right) for left in letters for right in letters]
    threes = ((left + right, third) for left, right in twos for third in letters)
    merged = list(itertools.islice(itertools.chain(twos, threes), num_merged))
    tokens = [*letters, *(left + right for left, right in merged)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, "<|begin|>", "<|end|>"],
        "tokenizer.ggml.token_type": [_NORMAL_TOKEN] * len(tokens) + [_CONTROL_TOKEN] * 2,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merged],
        "tokenizer.ggml.eos_token_id": size - 1,
        "tokenizer.ggml.bos_token_id": size - 2,
        "tokenizer.ggml.add_bos_token": False,
    }
