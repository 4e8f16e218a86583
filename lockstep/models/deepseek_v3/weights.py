"""DeepSeek-V3 checkpoints: config.json and tensor names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lockstep.layers.moe import GroupRule
from lockstep.models.config_reader import ACTIVATIONS, ConfigReader
from lockstep.models.deepseek_v3.model import DeepseekV3Config
from lockstep.models.weight_table import Entry, WeightTable


def read_config(values: Mapping[str, Any]) -> DeepseekV3Config:
    """From config.json.

    Raises:
        ConfigError: a field is missing, out of range, or changes the computation in a way we do not have.
    """
    reader = ConfigReader(values, "deepseek_v3")
    num_heads = reader.integer("num_attention_heads")
    max_context = reader.integer("max_position_embeddings", 4096)
    plain_dim, rope_dim = reader.integer("qk_nope_head_dim", 128), reader.integer("qk_rope_head_dim", 64)
    reader.expect("num_key_value_heads", num_heads)
    reader.expect("head_dim", rope_dim)
    reader.expect("qk_head_dim", plain_dim + rope_dim)
    reader.expect("moe_layer_freq", 1)
    reader.expect("scoring_func", "sigmoid")
    reader.expect("topk_method", "noaux_tc")
    # Layers behind the last one, which predict further tokens ahead, and how much their losses count.
    reader.ignore(["num_nextn_predict_layers", "num_mtp_layers", "aux_loss_alpha", "seq_aux", "ep_size"])
    rule = GroupRule(
        num_experts=reader.integer("n_routed_experts" if reader.has("n_routed_experts") else "num_local_experts", 256),
        num_chosen=reader.integer("num_experts_per_tok", 8),
        num_groups=reader.integer("n_group", 8),
        num_chosen_groups=reader.integer("topk_group", 4),
        normalise=reader.flag("norm_topk_prob", True),
        factor=reader.number("routed_scaling_factor", 2.5),
    )
    num_layers = reader.integer("num_hidden_layers")
    config = DeepseekV3Config(
        vocab_size=reader.integer("vocab_size"),
        width=reader.integer("hidden_size"),
        hidden=reader.integer("intermediate_size"),
        expert_hidden=reader.integer("moe_intermediate_size", 2048),
        num_shared=reader.integer("n_shared_experts", 1),
        rule=rule,
        num_layers=num_layers,
        num_dense=min(reader.integer("first_k_dense_replace", 3, minimum=0), num_layers),
        num_heads=num_heads,
        plain_dim=plain_dim,
        rope_dim=rope_dim,
        value_dim=reader.integer("v_head_dim", 128),
        q_rank=reader.integer("q_lora_rank") if reader.has("q_lora_rank") else _no_rank(reader),
        kv_rank=reader.integer("kv_lora_rank", 512),
        max_context=max_context,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=reader.rope(max_context),
        interleaved=reader.flag("rope_interleave", True),
        activation=reader.word("hidden_act", ACTIVATIONS, "silu"),
        tied=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("attention_bias", False),
    )
    reader.finish()
    return config


def _no_rank(reader: ConfigReader) -> int:
    """A null says that queries have no latent; a field that is missing stands for the published width."""
    return 0 if "q_lora_rank" in reader.values else 1536


def table(config: DeepseekV3Config) -> WeightTable:
    """Names of the tensors of one checkpoint."""
    entries = [Entry("embedding", ("model.embed_tokens",))]
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        mine, other = f"{ours}.attention", f"{theirs}.self_attn"
        entries.append(Entry(f"{ours}.attention_norm", (f"{theirs}.input_layernorm",)))
        if config.q_rank:
            entries += [
                Entry(f"{mine}.q_down", (f"{other}.q_a_proj",)),
                Entry(f"{mine}.q_norm", (f"{other}.q_a_layernorm",)),
                Entry(f"{mine}.q_up", (f"{other}.q_b_proj",)),
            ]
        else:
            entries.append(Entry(f"{mine}.q_up", (f"{other}.q_proj",)))
        entries += [
            Entry(f"{mine}.kv_down", (f"{other}.kv_a_proj_with_mqa",)),
            Entry(f"{mine}.kv_norm", (f"{other}.kv_a_layernorm",)),
            Entry(f"{mine}.kv_up", (f"{other}.kv_b_proj",)),
            Entry(f"{mine}.out", (f"{other}.o_proj",)),
            Entry(f"{ours}.mlp_norm", (f"{theirs}.post_attention_layernorm",)),
        ]
        entries += _feed_forward(config, index, f"{ours}.mlp", f"{theirs}.mlp")
    entries.append(Entry("norm", ("model.norm",)))
    if not config.tied:
        entries.append(Entry("head", ("lm_head",)))
    beyond = rf".*rotary_emb\.inv_freq|model\.layers\.{config.num_layers}\..*"
    return WeightTable(tuple(entries), unused=re.compile(beyond))


def _feed_forward(config: DeepseekV3Config, index: int, ours: str, theirs: str) -> list[Entry]:
    if index < config.num_dense:
        return [
            Entry(f"{ours}.gate_up", (f"{theirs}.gate_proj", f"{theirs}.up_proj")),
            Entry(f"{ours}.down", (f"{theirs}.down_proj",)),
        ]
    experts, shared = f"{theirs}.experts.{{}}", f"{theirs}.shared_experts"
    return [
        Entry(f"{ours}.router", (f"{theirs}.gate",)),
        Entry(f"{ours}.choice", (f"{theirs}.gate.e_score_correction_bias",)),
        Entry(f"{ours}.gate_up", (f"{experts}.gate_proj", f"{experts}.up_proj")),
        Entry(f"{ours}.down", (f"{experts}.down_proj",)),
        Entry(f"{ours}.shared.gate_up", (f"{shared}.gate_proj", f"{shared}.up_proj")),
        Entry(f"{ours}.shared.down", (f"{shared}.down_proj",)),
    ]
