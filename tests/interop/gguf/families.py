"""Tiny models of every family, made by `transformers` with random weights and saved as it saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
LONG = {"max_position_embeddings": 131072}
GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 100,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "llama-3.1": ("LlamaConfig", {**BASE, **LONG, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "head_dim": 32}),
    "llama-biased": ("LlamaConfig", {**BASE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-linear": ("LlamaConfig", {**BASE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": 8}),
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", BASE),
    "qwen2-yarn": ("Qwen2Config", {**BASE, **LONG, "rope_theta": 1e6, "rope_scaling": YARN}),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**BASE, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 32},
    ),
    "gpt2": ("GPT2Config", GPT2),
    "gemma2": ("Gemma2Config", {**BASE, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**BASE, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 8}),
    "deepseek-v2": ("DeepseekV2Config", {**BASE, **MLA, "q_lora_rank": None}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **BASE,
            **MLA,
            **LONG,
            "q_lora_rank": 32,
            "n_group": 2,
            "topk_group": 1,
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
        },
    ),
}

TOKENS = (torch.arange(24) * 7 % 100)[None]


def save_tiny(name: str, folder: Path) -> torch.Tensor:
    """Save the family's model and return its logits on `TOKENS`.

    Weights are multiples of 2^-8 below 4, so that the norms' added one is exact in float32.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, values = CONFIGS[name]
    config = getattr(transformers, kind)(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) * 25).round() / 256)
        model.save_pretrained(folder)
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def logits_of(folder: Path, **options: Any) -> torch.Tensor:
    """Logits of a saved model, in float32."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", **options}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits
