"""llama.cpp itself, where an interpreter that has llama-cpp-python is named: it reads what `convert` writes from folders of
every family with real vocabularies, and gets our ids, our logits and our tokens; and it mixes formats as we do."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.llm import LLM
from lockstep.interop.alike import logits_of
from lockstep.interop.convert import FORMATS, convert
from lockstep.interop.gguf import GGUFFile, GGUFSource, export, save_gguf
from lockstep.interop.gguf.formats import FILE_TYPES
from lockstep.interop.hf import HFFolder, save_folder
from lockstep.interop.hf.tokenizer_files import write_tokenizer
from lockstep.models.families import build_model, hf_tensors
from lockstep.tokenize.tokenizer import Tokenizer
from tests.tokenize.vocabularies import read_metadata, read_vectors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.05,
    "hidden_act": "silu",
    "head_dim": 32,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 256}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 16, "hidden_activation": "gelu_pytorch_tanh"}
LATENT = {
    **{"num_key_value_heads": 8, "kv_lora_rank": 64, "q_lora_rank": 64, "head_dim": None, "moe_intermediate_size": 256},
    **{"qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 1, "n_group": 2},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "topk_group": 1, "moe_layer_freq": 1},
    **{"routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
GPT2 = {"n_embd": 256, "n_layer": 8, "n_head": 8, "n_positions": 512, "activation_function": "gelu_new"}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama-spm", SIZES),
    "llama phi-3": ("LlamaForCausalLM", "phi-3", SIZES),
    "llama 3": ("LlamaForCausalLM", "llama-bpe", SIZES),
    "llama deepseek-coder": ("LlamaForCausalLM", "deepseek-coder", SIZES),
    "mixtral": ("MixtralForCausalLM", "llama-spm", {**SIZES, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "qwen2", SIZES),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen2", {**SIZES, **MOE}),
    "gpt2": ("GPT2LMHeadModel", "gpt-2", {**GPT2, "initializer_range": 0.05, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", "llama-spm", {**SIZES, **GEMMA, "tie_word_embeddings": True}),
    "gemma3_text": ("Gemma3ForCausalLM", "llama-spm", {**SIZES, **GEMMA, "tie_word_embeddings": True}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "deepseek-coder", {**SIZES, **LATENT}),
}
# Its GELU is a table in float16; it multiplies the latent's projection into the queries.
BOUNDS = {"gpt2": 1e-3, "gemma2": 1e-3, "gemma3_text": 1e-3, "deepseek_v3": 1e-4}


def ask(**wish: Any) -> dict[str, Any]:
    python = os.environ.get("LOCKSTEP_LLAMA_CPP_PYTHON", "")
    if not python:
        pytest.skip("LOCKSTEP_LLAMA_CPP_PYTHON names no interpreter")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = str(Path(__file__).with_name("read_llama_cpp.py"))
    done = subprocess.run(
        [python, script], input=json.dumps(wish), capture_output=True, text=True, timeout=600, env=clean, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write_folder(name: str, folder: Path, *, words: bool = True) -> HFFolder:
    """A random model, with a real vocabulary or none, as a Hugging Face folder."""
    architecture, vocabulary, sizes = MODELS[name]
    metadata = read_metadata(vocabulary) if words else {}
    config = {key: value for key, value in sizes.items() if value is not None}
    num_rows = -(-len(metadata["tokenizer.ggml.tokens"]) // 64) * 64 if words else 512
    config |= {"architectures": [architecture], "model_type": name.split()[0], "vocab_size": num_rows}
    save_folder(folder, config, hf_tensors(build_model(config, 5), config))
    if words:
        write_tokenizer(folder, metadata)
    return HFFolder.open(folder)


def random_texts() -> list[str]:
    draw = random.Random(1)
    pools = [*"aeT09 \n\t.'-", " x", "éß", "中日", "かな", "한국", "Яж", "ع", "हि", "🙂", "👩‍👩‍👧", "½²", "\U0001fae0"]
    texts = ["".join(draw.choice(pools) for _ in range(draw.randint(1, 40))) for _ in range(200)]
    planes = ((33, 0x2500), (0x3000, 0xD7FF), (0x10000, 0x11000), (0x1F300, 0x1F700))
    texts += ["".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(12)) for _ in range(100)]
    return [text.replace("▁", "_") for text in texts]


@pytest.mark.parametrize("name", MODELS)
def test_it_reads_what_is_converted(name: str, tmp_path: Path) -> None:
    if not os.environ.get("LOCKSTEP_LLAMA_CPP_PYTHON"):
        pytest.skip("LOCKSTEP_LLAMA_CPP_PYTHON names no interpreter")
    source = write_folder(name, tmp_path / "folder")
    made = convert(source, tmp_path / "x.gguf", name="phi-3" if "phi-3" in name else name)
    assert made.logits is not None
    assert made.logits.largest < 1e-5
    tokenizer = Tokenizer.from_folder(tmp_path / "folder")
    vectors = [(text, ids) for text, ids in read_vectors(MODELS[name][1]) if text]
    texts = [text for text, _ in vectors] + random_texts()
    prompt = tokenizer.encode("Once upon a time, 12 models", add_special=True, parse_special=True)
    found = ask(file=str(tmp_path / "x.gguf"), texts=texts, prompt=prompt, num_new=16)
    assert found["ids"][: len(vectors)] == [ids for _, ids in vectors]
    ours = tokenizer.encode_batch(texts, add_special=False, parse_special=True)
    assert [i for i, (one, two) in enumerate(zip(ours, found["ids"], strict=True)) if one != two] == []
    assert found["around"] == tokenizer.encode("a", add_special=True, parse_special=True)
    assert set(tokenizer.eos_ids) <= set(found["ends"])
    written = GGUFSource.open(tmp_path / "x.gguf")
    logits = logits_of(written, prompt, "fp32")[-1].numpy()
    error = np.abs(logits - np.array(found["logits"])).max() / np.abs(logits).max()
    print(f"{name}: {len(texts)} texts, logits within {error:.1e}")
    assert error < BOUNDS.get(name, 1e-5)
    llm = LLM(tmp_path / "x.gguf", config=EngineConfig(max_context=64, max_sequences=1, num_pages=8), dtype="fp32")
    sample = llm.generate([prompt], SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True))[0][0]
    assert list(sample.tokens) == found["greedy"]


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2", "qwen3_moe", "gpt2", "gemma2", "deepseek_v3"])
def test_it_mixes_formats_as_we_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("LOCKSTEP_LLAMA_CPP_PYTHON"):
        pytest.skip("LOCKSTEP_LLAMA_CPP_PYTHON names no interpreter")
    source = write_folder(name, tmp_path / "folder", words=False)
    convert(source, tmp_path / "x.gguf", check=False)
    names = sorted({kind for word, kind in FORMATS.items() if kind and word not in ("f32", "f16", "bf16")})
    its = {str(tmp_path / f"{kind}.gguf"): FILE_TYPES[kind] for kind in names}
    assert set(ask(file=str(tmp_path / "x.gguf"), quantise_to=its).values()) == {0}
    # Which formats is known before a byte is quantised.
    monkeypatch.setattr(export, "write_gguf", lambda *_: None)
    for kind in names:
        ours = save_gguf(tmp_path / "ours.gguf", source, kind, pure=False)
        file = GGUFFile.open(tmp_path / f"{kind}.gguf")
        assert ours == {tensor: info.type.name for tensor, info in file.tensors.items()}, kind
