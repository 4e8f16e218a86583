"""Models and batches that cost milliseconds."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from lockstep.learn.packing import Example
from lockstep.models.families import build_model
from lockstep.models.language import LanguageModel

VOCAB = 96
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
}


def tiny(values: Mapping[str, Any] = LLAMA, dtype: str = "fp32", *, seed: int = 7) -> LanguageModel:
    """A trainable model of two layers."""
    return build_model(values, seed, dtype)


def examples(num: int, *, seed: int) -> list[Example]:
    """Prompts of weight 0, answers of various weights, and a column "advantage"."""
    rng = random.Random(seed)
    made = []
    for _ in range(num):
        prompt, answer = rng.randrange(1, 12), rng.randrange(1, 18)
        weight = [0.0] * prompt + [rng.choice((0.5, 1.0, 2.0)) for _ in range(answer)]
        made.append(
            Example.of(
                [rng.randrange(VOCAB) for _ in range(prompt + answer)],
                weight=weight,
                columns={"advantage": [rng.gauss(0, 1) for _ in weight]},
            )
        )
    return made
