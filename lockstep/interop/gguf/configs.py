"""Model configs between GGUF metadata and Hugging Face dicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lockstep.core.errors import FormatError, InputError, unknown_name
from lockstep.interop.gguf import rope_scaling
from lockstep.interop.gguf.container import GGUFFile, ValueType
from lockstep.interop.gguf.naming import FAMILIES, Family, family_of

# (GGUF key after the architecture, Hugging Face key), one to one.
_BASE = (
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
)
_HEAD = (("attention.key_length", "head_dim"),)
_GPT2 = (
    ("block_count", "n_layer"),
    ("context_length", "n_positions"),
    ("embedding_length", "n_embd"),
    ("feed_forward_length", "n_inner"),
    ("attention.head_count", "n_head"),
    ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
)
_MIXTRAL = (("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok"))
_QWEN_MOE = (
    ("expert_count", "num_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
)
_WINDOW = (("attention.sliding_window", "sliding_window"),)
_SOFTCAPS = (
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
)
_DEEPSEEK = (
    ("attention.q_lora_rank", "q_lora_rank"),
    ("attention.kv_lora_rank", "kv_lora_rank"),
    ("rope.dimension_count", "qk_rope_head_dim"),
    ("leading_dense_block_count", "first_k_dense_replace"),
    ("expert_count", "n_routed_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_shared_count", "n_shared_experts"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_weights_scale", "routed_scaling_factor"),
    ("expert_weights_norm", "norm_topk_prob"),
    ("expert_group_count", "n_group"),
    ("expert_group_used_count", "topk_group"),
)

KEYS: dict[str, tuple[tuple[str, str], ...]] = {
    "llama": _BASE + _HEAD,
    "mistral": _BASE + _HEAD + _WINDOW,
    "mixtral": _BASE + _HEAD + _WINDOW + _MIXTRAL,
    "qwen2": _BASE + _HEAD,
    "qwen3": _BASE + _HEAD,
    "qwen3_moe": _BASE + _HEAD + _QWEN_MOE,
    "gpt2": _GPT2,
    "gemma2": _BASE + _HEAD + _WINDOW + _SOFTCAPS,
    "gemma3_text": _BASE + _HEAD + _WINDOW + _SOFTCAPS,
    "deepseek_v2": _BASE + _DEEPSEEK,
    "deepseek_v3": _BASE + _DEEPSEEK,
}

_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "n_layer", "n_embd", "n_head")

_ACTIVATIONS = {"gpt2": ("activation_function", "gelu_new")} | dict.fromkeys(
    ("gemma2", "gemma3_text"), ("hidden_activation", "gelu_pytorch_tanh")
)

_SMOOTH = ("gelu_new", "gelu_pytorch_tanh")
# (key, what GGUF's architecture always computes): a file has no word for it.
_ALWAYS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "gpt2": ("activation_function", _SMOOTH),
    "gemma2": ("hidden_activation", _SMOOTH),
    "gemma3_text": ("hidden_activation", _SMOOTH),
}

# What `transformers` takes where a config.json leaves a key out.
_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "rms_norm_eps": 1e-6}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
    "gemma2": {
        **_GEMMA,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
    },
    "gemma3_text": {**_GEMMA, "rope_theta": 1e6, "max_position_embeddings": 131072},
}

# The others always have biases on q, k and v, or never.
_TELLS_BIAS = ("llama", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")

# Layers of the one size of each that scales attention by the width per head instead of by the head's own width.
_WIDE_ATTENTION_LAYERS = {"gemma2": 46, "gemma3_text": 62}

_SIGMOID_GATE = 2


def family_of_file(file: GGUFFile) -> Family:
    """Which family's model a container holds.

    Raises:
        FormatError: the architecture is missing or not one of ours.
    """
    arch = file.value("general.architecture")
    archs = {family.arch for family in FAMILIES.values()}
    if not isinstance(arch, str) or arch not in archs:
        raise FormatError(unknown_name("general.architecture", str(arch)[:80], archs), path=file.path)
    if arch == "deepseek2":
        gate = file.value("deepseek2.expert_gating_func")
        return FAMILIES["deepseek_v3" if gate == _SIGMOID_GATE else "deepseek_v2"]
    if arch == "llama" and file.value("llama.expert_count"):
        return FAMILIES["mixtral"]
    if arch == "llama" and file.value("llama.attention.sliding_window"):
        return FAMILIES["mistral"]
    return next(family for family in FAMILIES.values() if family.arch == arch)


def config_of(file: GGUFFile, family: Family) -> dict[str, Any]:
    """The `config.json` of the model in a container, in the keys that published checkpoints use.

    Raises:
        FormatError: a key is missing, or of the wrong type or an impossible value.
    """
    fields = _scalars(file, family.arch)
    name = family.model_types[0]
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": name}
    for gguf_key, hf_key in KEYS[name]:
        if gguf_key in fields:
            config[hf_key] = fields[gguf_key]
        elif hf_key in _REQUIRED:
            raise FormatError(f"metadata {family.arch}.{gguf_key} is missing", path=file.path)
    _check_sizes(config, file.path)
    config["vocab_size"] = _vocab_size(file)
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    if name in _ACTIVATIONS:
        key, value = _ACTIVATIONS[name]
        config[key] = value
    else:
        config["hidden_act"] = "silu"
    if name in _TELLS_BIAS:
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if name == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    for hf_key, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = file.value(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int):
            config[hf_key] = token
    dtype = {0: "float32", 1: "float16", 32: "bfloat16"}.get(_number(file.value("general.file_type")))
    if dtype is not None:
        config["torch_dtype"] = dtype
    if name == "gpt2":
        return _finish_gpt2(config)
    return _finish(file, family, config, fields)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _scalars(file: GGUFFile, arch: str) -> dict[str, Any]:
    """Single values under the architecture, float32 in the shortest decimal that stands for it."""
    fields: dict[str, Any] = {}
    for key, field in file.metadata.items():
        if not key.startswith(arch + "."):
            continue
        short = key[len(arch) + 1 :]
        if field.type is ValueType.FLOAT32:
            fields[short] = float(str(np.float32(field.value)))
        elif field.type is ValueType.ARRAY and short in ("attention.head_count_kv", "feed_forward_length"):
            values = set(np.asarray(field.value).tolist()) if field.item_type in _INTEGERS else set()
            if len(values) != 1:
                raise FormatError(f"metadata {key} differs between layers, which is not supported", path=file.path)
            fields[short] = values.pop()
        else:
            fields[short] = field.value
    return fields


_INTEGERS = (ValueType.UINT32, ValueType.INT32, ValueType.UINT64, ValueType.INT64)
_FLOATS = ("_eps", "epsilon", "softcapping", "scaling_factor")


def _check_sizes(config: dict[str, Any], path: str) -> None:
    for key, value in config.items():
        if key in ("architectures", "model_type", "norm_topk_prob"):
            continue
        if key.endswith(_FLOATS):
            if not isinstance(value, float | int) or not math.isfinite(value):
                raise FormatError(f"{key} is {value!r:.80}, expected a finite number", path=path)
        elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise FormatError(f"{key} is {value!r:.80}, expected a whole number", path=path)
        elif value == 0 and key in (*_REQUIRED, "head_dim", "num_key_value_heads"):
            raise FormatError(f"{key} is 0", path=path)


def _vocab_size(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError("tensor token_embd.weight is missing or not a matrix", path=file.path)
    return embedding.shape[0]


def _finish_gpt2(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("n_inner") == 4 * config["n_embd"]:
        config["n_inner"] = None
    return config


def _finish(file: GGUFFile, family: Family, config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    name = family.model_types[0]
    theta = fields.get("rope.freq_base", 10000.0)
    if not isinstance(theta, float | int) or not 0 < theta < math.inf:
        raise FormatError(f"metadata {family.arch}.rope.freq_base is {theta!r:.80}", path=file.path)
    config["rope_theta"] = theta
    scaling = rope_scaling.from_fields(fields, family.arch, file.path)
    if rope_scaling.TENSOR in file.tensors:
        if file.info(rope_scaling.TENSOR).type.name != "F32":
            raise FormatError(f"{rope_scaling.TENSOR} is not F32", path=file.path)
        factors = file.tensor_bytes(rope_scaling.TENSOR).copy().view("<f4")
        scaling = rope_scaling.llama3_parameters(factors, theta, file.path)
    config["rope_scaling"] = scaling
    if name in ("qwen2", "qwen3", "qwen3_moe"):
        config["use_sliding_window"] = False
    if name == "qwen3_moe":
        # The architecture always renormalises and routes in every layer; files do not say it.
        config |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if name in _WIDE_ATTENTION_LAYERS:
        config |= _gemma(name, config, fields)
    if family.arch == "deepseek2":
        config |= _latent(name, config, fields, file.path)
    return config


def _gemma(name: str, config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    wide = config["num_hidden_layers"] == _WIDE_ATTENTION_LAYERS[name]
    width = config["hidden_size"] // config["num_attention_heads"]
    head_dim = config.setdefault("head_dim", 256)
    scale = fields.get("attention.scale")
    found: dict[str, Any] = {"query_pre_attn_scalar": width if wide else head_dim, "attention_bias": False}
    if isinstance(scale, float) and scale > 0:
        found["query_pre_attn_scalar"] = round(scale**-2)
    if name == "gemma3_text":
        found["rope_local_base_freq"] = fields.get("rope.freq_base_swa", 10000.0)
        found["sliding_window_pattern"] = 6
    return found


def _latent(name: str, config: dict[str, Any], fields: dict[str, Any], path: str) -> dict[str, Any]:
    key: Any = fields.get("attention.key_length_mla", fields.get("attention.key_length"))
    value: Any = fields.get("attention.value_length_mla", fields.get("attention.value_length"))
    rope: Any = config.get("qk_rope_head_dim")
    if not all(isinstance(item, int) for item in (key, value, rope)) or not 0 < rope < key:
        raise FormatError(f"head sizes key={key}, value={value}, rope={rope} make no sense", path=path)
    groups = config.get("n_group", 1) > 1
    return {
        "qk_nope_head_dim": key - rope,
        "v_head_dim": value,
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": config.get("q_lora_rank"),
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid" if name == "deepseek_v3" else "softmax",
        "topk_method": "noaux_tc" if name == "deepseek_v3" else ("group_limited_greedy" if groups else "greedy"),
    }


def generation_config_of(file: GGUFFile) -> dict[str, Any]:
    """Special ids (every id that ends a turn counts as eos) and the sampling defaults the file recommends."""
    found: dict[str, Any] = {}
    bos = file.value("tokenizer.ggml.bos_token_id")
    if isinstance(bos, int):
        found["bos_token_id"] = bos
    ends = [file.value(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(token for token in ends if isinstance(token, int)))
    if unique:
        found["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    for key, name in (("temp", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
        value = file.value(f"general.sampling.{key}")
        if isinstance(value, int | float):
            found[name] = float(str(np.float32(value))) if isinstance(value, float) else value
    return found


def fields_of(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """GGUF metadata of a Hugging Face config, of either generation (`rope_theta` or `rope_parameters`).

    Returns:
        the family, and fields by full key, `general.architecture` first.

    Raises:
        InputError: the family is unknown, a key is missing, or GGUF cannot say what the config asks for.
    """
    family = family_of(str(config.get("model_type")))
    name, arch = family.model_types[0], family.arch
    config = _with_defaults(name, config)
    short: dict[str, Any] = {}
    for gguf_key, hf_key in KEYS[name]:
        value = config.get(hf_key)
        if value is None and hf_key in _REQUIRED:
            raise InputError(f"the config lacks {hf_key!r}", field=hf_key)
        if value is not None:
            short[gguf_key] = float(value) if hf_key.endswith(_FLOATS) else value
    if config.get("vocab_size") is None:
        raise InputError("the config lacks 'vocab_size'", field="vocab_size")
    short["vocab_size"] = config["vocab_size"]
    if name != "gpt2":
        short |= _rope_fields(name, arch, config)
    if family.arch == "deepseek2":
        short |= _latent_fields(name, config)
    return family, {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in short.items()}}


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Width of a head: the config's own, else the model's width divided by the heads."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _with_defaults(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    full = {**_DEFAULTS.get(name, {}), **config}
    key, known = _ALWAYS.get(name, ("hidden_act", ("silu", "swish")))
    if full.get(key) not in (None, *known):
        raise InputError(f"GGUF's {name} always computes {known[0]}; this config has {key}={full[key]!r}", field=key)
    if full.get("scale_attn_by_inverse_layer_idx"):
        raise InputError("GGUF's gpt2 scales attention alike in all layers; this config does not", field="attention")
    if name == "gpt2":
        if full.get("n_inner") is None and "n_embd" in full:
            full["n_inner"] = 4 * full["n_embd"]
        full.setdefault("layer_norm_epsilon", 1e-5)
        return full
    heads = full.get("num_attention_heads")
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = heads
    if name == "qwen3_moe":
        full.setdefault("num_experts", full.get("num_local_experts"))
        if (
            full.get("norm_topk_prob") is False
            or full.get("mlp_only_layers")
            or full.get("decoder_sparse_step", 1) != 1
        ):
            raise InputError(
                "GGUF's qwen3moe renormalises the chosen experts' weights and routes in every layer; this config does not",
                field="norm_topk_prob",
            )
    if full.get("use_sliding_window") and full.get("sliding_window"):
        raise InputError(f"GGUF's {name} has no sliding window; this config uses one", field="use_sliding_window")
    return full


def _rope_fields(name: str, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    rope = rope_scaling.parameters(config)
    fields: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"]), **rope_scaling.to_fields(rope, arch)}
    if arch == "deepseek2":
        return fields
    head_dim = head_dim_of(config)
    fields |= {"rope.dimension_count": head_dim, "attention.key_length": head_dim, "attention.value_length": head_dim}
    if name in _WIDE_ATTENTION_LAYERS:
        fields["attention.scale"] = float(config.get("query_pre_attn_scalar", head_dim)) ** -0.5
    if name == "gemma3_text":
        local = config.get("rope_local_base_freq", rope.get("rope_local_base_freq", 10000.0))
        fields["rope.freq_base_swa"] = float(local)
        if config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6)) != 6:
            raise InputError("GGUF's gemma3 has every sixth layer global; this config differs", field="layer_types")
    return fields


def _latent_fields(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    rope, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
    return {
        # What the cache holds, as against what a head sees.
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "expert_gating_func": _SIGMOID_GATE if name == "deepseek_v3" else 1,
    }
