"""Tensor names of the families in Hugging Face folders and in GGUF files, and what has to happen to the numbers.

A rule pairs two name stems; `.weight` and `.bias` are carried over. `{b}` is the block, `{x}` the expert.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import torch

from lockstep.core.errors import InputError, unknown_name


class How(Enum):
    """What a tensor goes through between the two."""

    SAME = "same"
    ROPE_Q = "rows of each query head interleaved for rope on neighbouring pairs"
    ROPE_K = "the same for key heads"
    PLUS_ONE = "GGUF stores the norm's factor, Hugging Face the factor minus one"
    TRANSPOSED = "Hugging Face stores [in, out]"
    EXPERTS = "GGUF stacks the experts of a block"
    KV_B = "GGUF splits the latent's up-projection into keys (transposed) and values"


@dataclass(frozen=True)
class Rule:
    """One pair of names. `hf` holds the whole name if it ends in neither weight nor bias."""

    hf: str
    gguf: str
    how: How = How.SAME


@dataclass(frozen=True)
class Family:
    """A GGUF architecture with one kind of Hugging Face model in it."""

    arch: str
    model_types: tuple[str, ...]
    """Hugging Face `model_type`s; the first is written."""
    architecture: str
    rules: tuple[Rule, ...]


_L = "model.layers.{b}."
_TOP = (
    Rule("model.embed_tokens", "token_embd"),
    Rule("model.norm", "output_norm"),
    Rule("lm_head", "output"),
)
_ATTENTION = (
    Rule(_L + "self_attn.q_proj", "blk.{b}.attn_q"),
    Rule(_L + "self_attn.k_proj", "blk.{b}.attn_k"),
    Rule(_L + "self_attn.v_proj", "blk.{b}.attn_v"),
    Rule(_L + "self_attn.o_proj", "blk.{b}.attn_output"),
)
_ROPE_ATTENTION = (
    Rule(_L + "self_attn.q_proj", "blk.{b}.attn_q", How.ROPE_Q),
    Rule(_L + "self_attn.k_proj", "blk.{b}.attn_k", How.ROPE_K),
    *_ATTENTION[2:],
)
_NORMS = (
    Rule(_L + "input_layernorm", "blk.{b}.attn_norm"),
    Rule(_L + "post_attention_layernorm", "blk.{b}.ffn_norm"),
)
_QK_NORMS = (
    Rule(_L + "self_attn.q_norm", "blk.{b}.attn_q_norm"),
    Rule(_L + "self_attn.k_norm", "blk.{b}.attn_k_norm"),
)
_MLP = (
    Rule(_L + "mlp.gate_proj", "blk.{b}.ffn_gate"),
    Rule(_L + "mlp.up_proj", "blk.{b}.ffn_up"),
    Rule(_L + "mlp.down_proj", "blk.{b}.ffn_down"),
)
_MIXTRAL_MOE = (
    Rule(_L + "block_sparse_moe.gate", "blk.{b}.ffn_gate_inp"),
    Rule(_L + "block_sparse_moe.experts.{x}.w1", "blk.{b}.ffn_gate_exps", How.EXPERTS),
    Rule(_L + "block_sparse_moe.experts.{x}.w3", "blk.{b}.ffn_up_exps", How.EXPERTS),
    Rule(_L + "block_sparse_moe.experts.{x}.w2", "blk.{b}.ffn_down_exps", How.EXPERTS),
)
_MOE = (
    Rule(_L + "mlp.gate", "blk.{b}.ffn_gate_inp"),
    Rule(_L + "mlp.experts.{x}.gate_proj", "blk.{b}.ffn_gate_exps", How.EXPERTS),
    Rule(_L + "mlp.experts.{x}.up_proj", "blk.{b}.ffn_up_exps", How.EXPERTS),
    Rule(_L + "mlp.experts.{x}.down_proj", "blk.{b}.ffn_down_exps", How.EXPERTS),
)
_GEMMA = (
    Rule("model.embed_tokens", "token_embd"),
    Rule("model.norm", "output_norm", How.PLUS_ONE),
    Rule("lm_head", "output"),
    Rule(_L + "input_layernorm", "blk.{b}.attn_norm", How.PLUS_ONE),
    Rule(_L + "post_attention_layernorm", "blk.{b}.post_attention_norm", How.PLUS_ONE),
    Rule(_L + "pre_feedforward_layernorm", "blk.{b}.ffn_norm", How.PLUS_ONE),
    Rule(_L + "post_feedforward_layernorm", "blk.{b}.post_ffw_norm", How.PLUS_ONE),
    *_ATTENTION,
    *_MLP,
)
_GEMMA_QK_NORMS = (
    Rule(_L + "self_attn.q_norm", "blk.{b}.attn_q_norm", How.PLUS_ONE),
    Rule(_L + "self_attn.k_norm", "blk.{b}.attn_k_norm", How.PLUS_ONE),
)
_GPT2 = (
    Rule("transformer.wte", "token_embd"),
    Rule("transformer.wpe", "position_embd"),
    Rule("transformer.ln_f", "output_norm"),
    Rule("lm_head", "output"),
    Rule("transformer.h.{b}.ln_1", "blk.{b}.attn_norm"),
    Rule("transformer.h.{b}.ln_2", "blk.{b}.ffn_norm"),
    Rule("transformer.h.{b}.attn.c_attn", "blk.{b}.attn_qkv", How.TRANSPOSED),
    Rule("transformer.h.{b}.attn.c_proj", "blk.{b}.attn_output", How.TRANSPOSED),
    Rule("transformer.h.{b}.mlp.c_fc", "blk.{b}.ffn_up", How.TRANSPOSED),
    Rule("transformer.h.{b}.mlp.c_proj", "blk.{b}.ffn_down", How.TRANSPOSED),
)
_LATENT_ATTENTION = (
    Rule(_L + "self_attn.q_proj", "blk.{b}.attn_q"),
    Rule(_L + "self_attn.q_a_proj", "blk.{b}.attn_q_a"),
    Rule(_L + "self_attn.q_a_layernorm", "blk.{b}.attn_q_a_norm"),
    Rule(_L + "self_attn.q_b_proj", "blk.{b}.attn_q_b"),
    Rule(_L + "self_attn.kv_a_proj_with_mqa", "blk.{b}.attn_kv_a_mqa"),
    Rule(_L + "self_attn.kv_a_layernorm", "blk.{b}.attn_kv_a_norm"),
    # Files from before the split hold the projection whole.
    Rule(_L + "self_attn.kv_b_proj", "blk.{b}.attn_k_b", How.KV_B),
    Rule(_L + "self_attn.kv_b_proj", "blk.{b}.attn_v_b", How.KV_B),
    Rule(_L + "self_attn.kv_b_proj", "blk.{b}.attn_kv_b"),
    Rule(_L + "self_attn.o_proj", "blk.{b}.attn_output"),
)
_SHARED_EXPERTS = (
    Rule(_L + "mlp.gate.e_score_correction_bias", "blk.{b}.exp_probs_b.bias"),
    Rule(_L + "mlp.shared_experts.gate_proj", "blk.{b}.ffn_gate_shexp"),
    Rule(_L + "mlp.shared_experts.up_proj", "blk.{b}.ffn_up_shexp"),
    Rule(_L + "mlp.shared_experts.down_proj", "blk.{b}.ffn_down_shexp"),
)
_DEEPSEEK = (*_TOP, *_NORMS, *_LATENT_ATTENTION, *_MLP, *_MOE, *_SHARED_EXPERTS)

FAMILIES: dict[str, Family] = {
    family.model_types[0]: family
    for family in (
        Family("llama", ("llama", "aquila", "yi"), "LlamaForCausalLM", (*_TOP, *_NORMS, *_ROPE_ATTENTION, *_MLP)),
        Family("llama", ("mistral",), "MistralForCausalLM", (*_TOP, *_NORMS, *_ROPE_ATTENTION, *_MLP)),
        Family("llama", ("mixtral",), "MixtralForCausalLM", (*_TOP, *_NORMS, *_ROPE_ATTENTION, *_MIXTRAL_MOE)),
        Family("qwen2", ("qwen2",), "Qwen2ForCausalLM", (*_TOP, *_NORMS, *_ATTENTION, *_MLP)),
        Family("qwen3", ("qwen3",), "Qwen3ForCausalLM", (*_TOP, *_NORMS, *_ATTENTION, *_QK_NORMS, *_MLP)),
        Family("qwen3moe", ("qwen3_moe",), "Qwen3MoeForCausalLM", (*_TOP, *_NORMS, *_ATTENTION, *_QK_NORMS, *_MOE)),
        Family("gpt2", ("gpt2",), "GPT2LMHeadModel", _GPT2),
        Family("gemma2", ("gemma2",), "Gemma2ForCausalLM", _GEMMA),
        Family("gemma3", ("gemma3_text",), "Gemma3ForCausalLM", (*_GEMMA, *_GEMMA_QK_NORMS)),
        Family("deepseek2", ("deepseek_v2",), "DeepseekV2ForCausalLM", _DEEPSEEK),
        Family("deepseek2", ("deepseek_v3",), "DeepseekV3ForCausalLM", _DEEPSEEK),
    )
}

# Buffers that old checkpoints carry along; the model computes them.
_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


def is_buffer(hf_name: str) -> bool:
    """True for a name that holds no weight."""
    return _BUFFERS.search(hf_name) is not None


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
        InputError: no family here has it.
    """
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = [name for family in FAMILIES.values() for name in family.model_types]
    raise InputError(unknown_name("model_type", model_type, known), field="model_type")


@dataclass(frozen=True)
class Match:
    """A name that a rule explains: `block` and `expert` are None where the rule has none."""

    rule: Rule
    block: int | None
    expert: int | None
    suffix: str

    def hf(self, expert: int | None = None) -> str:
        """The Hugging Face name, of the given expert if the rule stacks them."""
        return _fill(self.rule.hf, self.block, self.expert if expert is None else expert) + self._hf_suffix

    @property
    def gguf(self) -> str:
        whole = _is_whole(self.rule)
        return _fill(self.rule.gguf, self.block, None) + ("" if whole else self.suffix)

    @property
    def _hf_suffix(self) -> str:
        return "" if _is_whole(self.rule) else self.suffix


def _is_whole(rule: Rule) -> bool:
    return rule.gguf.endswith((".weight", ".bias"))


def _fill(stem: str, block: int | None, expert: int | None) -> str:
    return stem.replace("{b}", str(block)).replace("{x}", str(expert))


_NUMBER = re.compile(r"(?<=\.)(\d{1,5})(?=\.)")


def match_gguf(family: Family, name: str) -> Match | None:
    """The rule behind a GGUF name."""
    return _match(family, name, "gguf")


def match_hf(family: Family, name: str) -> Match | None:
    """The rule behind a Hugging Face name; GPT-2's may lack their `transformer.`."""
    if family.arch == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        name = "transformer." + name
    return _match(family, name, "hf")


def _match(family: Family, name: str, side: str) -> Match | None:
    # Numbers become {b} and {x} in the order they come, so that a rule is found by comparing strings.
    numbers = [int(text) for text in _NUMBER.findall(name)]
    if any(str(number) != text for number, text in zip(numbers, _NUMBER.findall(name), strict=True)):
        return None
    letters = iter(("{b}", "{x}"))
    template = _NUMBER.sub(lambda found: next(letters, found[0]), name)
    stem, _, ending = template.rpartition(".")
    for rule in family.rules:
        pattern = rule.hf if side == "hf" else rule.gguf
        if pattern in (template, stem):
            suffix = "" if pattern == template else "." + ending
            if suffix not in ("", ".weight", ".bias") or (suffix == "") != _is_whole(rule):
                return None
            return Match(
                rule,
                numbers[0] if "{b}" in pattern else None,
                numbers[1] if "{x}" in pattern else None,
                suffix,
            )
    return None


def interleave(num_rows: int, num_heads: int) -> torch.Tensor:
    """Row order of a GGUF q or k projection: `gguf = hf[order]`. Halves of a head become neighbouring pairs."""
    order = torch.arange(num_rows)
    return order.reshape(num_heads, 2, -1).transpose(1, 2).reshape(-1)


def deinterleave(num_rows: int, num_heads: int) -> torch.Tensor:
    """The inverse: `hf = gguf[order]`."""
    order = torch.arange(num_rows)
    return order.reshape(num_heads, -1, 2).transpose(1, 2).reshape(-1)
