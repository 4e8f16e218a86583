"""GPT-2 checkpoints: config.json and tensor names. Their matrices lie [in, out], q, k and v in one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lockstep.layers.gated import PlainKind
from lockstep.models.config_reader import ACTIVATIONS, ConfigReader
from lockstep.models.gpt2.model import GPT2Config
from lockstep.models.weight_table import Entry, WeightTable

_ACTIVATIONS: dict[str, PlainKind] = {**ACTIVATIONS, "relu": "relu"}
# Dropout, the classification head of other tasks, the order of operations in half precision, a second name of n_positions.
_IGNORED = (
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_type", "summary_use_proj", "summary_activation", "n_ctx"),
    *("summary_proj_to_labels", "summary_first_dropout", "reorder_and_upcast_attn"),
)


def read_config(values: Mapping[str, Any]) -> GPT2Config:
    """From config.json.

    Raises:
        ConfigError: a field is missing, out of range, or changes the computation in a way we do not have.
    """
    reader = ConfigReader(values, "gpt2")
    width = reader.integer("n_embd")
    reader.ignore(_IGNORED)
    config = GPT2Config(
        vocab_size=reader.integer("vocab_size"),
        width=width,
        hidden=reader.integer("n_inner", 4 * width),
        num_layers=reader.integer("n_layer"),
        num_heads=reader.integer("n_head"),
        max_context=reader.integer("n_positions"),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        activation=reader.word("activation_function", _ACTIVATIONS, "gelu_new"),
        tied=reader.flag("tie_word_embeddings", True),
        scores_by_head_dim=reader.flag("scale_attn_weights", True),
        scores_by_layer=reader.flag("scale_attn_by_inverse_layer_idx", False),
    )
    reader.finish()
    return config


def table(config: GPT2Config) -> WeightTable:
    """Names of the tensors of one checkpoint."""
    entries = [Entry("embedding", ("transformer.wte",)), Entry("positions", ("transformer.wpe",))]
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"transformer.h.{index}"
        entries += [
            Entry(f"{ours}.attention_norm", (f"{theirs}.ln_1",)),
            Entry(f"{ours}.attention.qkv", (f"{theirs}.attn.c_attn",), transposed=True, whole=True),
            Entry(f"{ours}.attention.out", (f"{theirs}.attn.c_proj",), transposed=True),
            Entry(f"{ours}.mlp_norm", (f"{theirs}.ln_2",)),
            Entry(f"{ours}.mlp.up", (f"{theirs}.mlp.c_fc",), transposed=True),
            Entry(f"{ours}.mlp.down", (f"{theirs}.mlp.c_proj",), transposed=True),
        ]
    entries.append(Entry("norm", ("transformer.ln_f",)))
    if not config.tied:
        entries.append(Entry("head", ("lm_head",)))
    # Older files hold the causal mask and its filling as if they were weights.
    return WeightTable(tuple(entries), re.compile(r".*\.attn\.(masked_)?bias"), optional_prefix="transformer.")
