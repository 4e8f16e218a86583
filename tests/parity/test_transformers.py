"""Every family against Transformers on random weights, and against itself: training = serving, without a tolerance."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.kernels.attention import KVCache
from lockstep.kernels.logprobs import token_logprobs
from lockstep.models.families import hf_tensors
from lockstep.models.language import LanguageModel

pytestmark = pytest.mark.slow

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 4.0],
    "long_factor": [2.0, 2.1, 2.3, 2.6, 3.0, 3.5, 4.1, 5.0],
}
# Low enough to bend the scores and logits of so small a model.
SOFTCAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
# GPT-2 names its sizes in its own way.
GPT2 = {
    **{"hidden_size": ..., "intermediate_size": ..., "num_hidden_layers": ..., "num_attention_heads": ...},
    **{"num_key_value_heads": ..., "max_position_embeddings": ...},
    **{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}

DEEPSEEK = {
    **{"num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3},
    **{"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "kv_lora_rank": 24, "q_lora_rank": 40},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_nextn_predict_layers": 0},
}

# The default of each family, then what sets its relatives apart. Windows are shorter than the text and than a page.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (
        "Llama",
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 5e5}},
    ),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}),
    "llama-head-dim": ("Llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama-longrope": ("Llama", {"rope_parameters": LONGROPE}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", {"sliding_window": 11}),
    "internlm3": ("InternLM3", {"qkv_bias": True, "bias": True, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-window": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "attention_bias": True,
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 3,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6}),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK),
    "deepseek-v3-yarn": (
        "DeepseekV3",
        {
            **DEEPSEEK,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
            "rope_interleave": False,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "attention_bias": True,
        },
    ),
    "deepseek-v3-plain-queries": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-by-layer": (
        "GPT2",
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "n_inner": 80, "tie_word_embeddings": False},
    ),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 10, **SOFTCAPS}),
    "gemma3": (
        "Gemma3Text",
        {"num_hidden_layers": 3, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 3},
    ),
    "gemma3-scaled": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "final_logit_softcapping": 5.0,
        },
    ),
}
MARK: list[Any] = list(CASES)


@pytest.fixture
def pair(request: pytest.FixtureRequest, pair_of: Callable[..., Any]) -> Any:
    kind, changes = CASES[request.param]
    return pair_of(kind, **changes)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def tokens(seed: int, length: int) -> Tensor:
    return torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(seed))


def step(sequences: list[tuple[Tensor, int, list[int]]], num_pages: int) -> ForwardBatch:
    """The next tokens of sequences, each (tokens, first position, pages)."""
    widest = max(len(pages) for _, _, pages in sequences)
    starts = [0]
    for new, _, _ in sequences:
        starts.append(starts[-1] + len(new))
    return ForwardBatch(
        tokens_T=torch.cat([new for new, _, _ in sequences]),
        positions_T=torch.cat([torch.arange(first, first + len(new)) for new, first, _ in sequences]),
        seq_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([first + len(new) for new, first, _ in sequences], dtype=torch.int32),
        pages_SP=torch.tensor([p + [0] * (widest - len(p)) for _, _, p in sequences], dtype=torch.int32),
        num_pages=num_pages,
    )


def _empty(num: int) -> list[list[Tensor]]:
    return [[] for _ in range(num)]


def poisoned_cache(model: LanguageModel, num_pages: int) -> KVCache:
    cache = model.new_cache(num_pages)
    for layer in cache.layers:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    return cache


@pytest.mark.parametrize("pair", MARK, indirect=True)
@torch.no_grad()
def test_prefill_and_greedy_steps_match_the_reference(pair: Any) -> None:
    model, prompt = pair.ours(), tokens(1, 21)
    expected = pair.reference(prompt[None], use_cache=True)
    cache, pages = poisoned_cache(model, 6), [3, 0, 5, 1, 4, 2]
    logits = model.logits(model(step([(prompt, 0, pages)], 6), cache))
    assert relative(logits, expected.logits[0]) < 1e-4
    worst, past, last = 0.0, expected.past_key_values, logits[-1]
    for position in range(21, 21 + 64):
        token = last.argmax().reshape(1)
        assert token == expected.logits[0, -1].argmax(), f"step {position - 21}"
        expected = pair.reference(token[None], past_key_values=past, use_cache=True)
        last = model.logits(model(step([(token, position, pages)], 6), cache))[0]
        worst = max(worst, relative(last, expected.logits[0, -1]))
    assert worst < 1e-4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("pair", MARK, indirect=True)
def test_learner_and_engine_see_the_same_bits(pair: Any, dtype: str) -> None:
    learner, engine = pair.ours(dtype, trainable=True), pair.ours(dtype)
    texts = [tokens(2, 37), tokens(3, 18)]
    trained = learner.logits(learner(ForwardBatch.packed(texts), None))
    assert trained.requires_grad
    # The same tokens in random chunks, in pages out of order, the two texts advancing unevenly.
    choose, served = random.Random(5), _empty(2)
    pages, done = [[4, 2, 0], [3, 1]], [0, 0]
    cache = poisoned_cache(engine, 5)
    with torch.no_grad():
        while any(done[i] < len(texts[i]) for i in range(2)):
            sizes = [min(choose.choice([0, 1, 1, 5, 17]), len(texts[i]) - done[i]) for i in range(2)]
            active = [i for i in range(2) if sizes[i]]
            if not active:
                continue
            parts = [(texts[i][done[i] : done[i] + sizes[i]], done[i], pages[i]) for i in active]
            rows = engine.logits(engine(step(parts, 5), cache)).split([sizes[i] for i in active])
            for i, row in zip(active, rows, strict=True):
                served[i].append(row)
                done[i] += sizes[i]
    assert torch.equal(trained, torch.cat(served[0] + served[1]))


@pytest.mark.parametrize("pair", MARK, indirect=True)
def test_gradients_match_the_reference(pair: Any, tmp_path: Path) -> None:
    model, text = pair.ours(trainable=True), tokens(4, 19)
    logits = model.logits(model(ForwardBatch.packed([text]), None))
    token_logprobs(logits[:-1], text[1:]).sum().backward()
    reference = pair.reference.requires_grad_()  # other tests share it
    log_probability = torch.log_softmax(reference(text[None]).logits[0, :-1], -1)
    reference.zero_grad()
    log_probability.gather(1, text[1:, None]).sum().backward()
    kept = {name: parameter.data for name, parameter in reference.named_parameters()}
    try:
        # Written as weights, gradients come out under the names of a checkpoint on both sides.
        for parameter in [*model.parameters(), *reference.parameters()]:
            assert parameter.grad is not None
            parameter.data = parameter.grad
        reference.save_pretrained(tmp_path)
    finally:
        for name, parameter in reference.named_parameters():
            parameter.data = kept[name]
        reference.zero_grad()
    expected = load_file(tmp_path / "model.safetensors")
    got = hf_tensors(model, pair.config)
    assert set(got) == set(expected)
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, gradient in got.items():
        # A key bias moves nothing through the softmax: its gradient is rounding alone, hence the floor.
        scale = max(float(expected[name].abs().max()), 1e-2 * largest)
        assert (gradient - expected[name]).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("pair", MARK, indirect=True)
def test_weights_go_back_under_their_names(pair: Any) -> None:
    for trainable in (False, True):
        back = hf_tensors(pair.ours(trainable=trainable), pair.config)
        assert set(back) == set(pair.tensors)
        assert all(torch.equal(back[name], tensor) for name, tensor in pair.tensors.items())
