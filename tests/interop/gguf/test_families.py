"""Hugging Face folder -> GGUF -> Hugging Face folder: the same tensors, the same config, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch

from lockstep.core.errors import FormatError, InputError
from lockstep.core.tensors import check_tensors
from lockstep.interop.gguf import GGUFFile, GGUFSource, TensorData, quantise, save_gguf, write_gguf
from lockstep.interop.gguf.naming import FAMILIES, deinterleave, interleave, match_gguf, match_hf
from lockstep.interop.gguf.rope_scaling import llama3_factors, llama3_parameters
from lockstep.interop.hf import HFFolder, save_folder

pytestmark = pytest.mark.slow  # `transformers` alone takes seconds to import
Tiny = Callable[[str], tuple[Path, torch.Tensor]]

NAMES = [
    "llama",
    "llama-3.1",
    "llama-biased",
    "llama-linear",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2-yarn",
    "qwen3",
    "qwen3-moe",
    "gpt2",
    "gemma2",
    "gemma3",
    "deepseek-v2",
    "deepseek-v3",
]

# Keys of training or of `transformers`' own bookkeeping, which no GGUF file holds.
UNSAID = {"initializer_range", "attention_dropout", "use_cache", "pretraining_tp", "dtype", "architectures"}


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, tiny: Tiny, families: ModuleType, tmp_path: Path) -> None:
    folder, logits = tiny(name)
    original = HFFolder.open(folder)
    save_gguf(tmp_path / "x.gguf", original, "F32")
    source = GGUFSource.open(tmp_path / "x.gguf")
    check_tensors(source, {tensor: original.shape(tensor) for tensor in original.names()})
    for tensor in original.names():
        assert torch.equal(source.tensor(tensor), original.tensor(tensor)), tensor
        assert source.quantised(tensor) is None
    save_folder(tmp_path / "back", source.config(), ((n, source.tensor(n)) for n in source.names()))
    assert torch.equal(families.logits_of(tmp_path / "back"), logits)


@pytest.mark.parametrize("name", NAMES)
def test_config_survives(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """As `transformers` itself reads the two configs."""
    import transformers

    folder, _ = tiny(name)
    save_gguf(tmp_path / "x.gguf", HFFolder.open(folder), "F32")
    save_folder(tmp_path / "back", GGUFSource.open(tmp_path / "x.gguf").config(), {"t": torch.zeros(1)})
    before = transformers.AutoConfig.from_pretrained(folder).to_dict()
    after = transformers.AutoConfig.from_pretrained(tmp_path / "back").to_dict()
    ignored = UNSAID | {"_name_or_path", "pad_token_id", "sliding_window_pattern", "moe_layer_freq", "scoring_func"}
    differing = {key for key in before if key not in ignored and before[key] != after.get(key)}
    # A width per head that the config leaves to be computed comes back computed.
    assert differing <= {"head_dim", "topk_method"}, {key: (before[key], after.get(key)) for key in differing}
    if "head_dim" in differing:
        assert before["head_dim"] is None
        assert after["head_dim"] == before["hidden_size"] // before["num_attention_heads"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_transformers_reads_our_gguf(name: str, tiny: Tiny, families: ModuleType, tmp_path: Path) -> None:
    """Its own GGUF importer, of the families and options it knows, gets the same model out of our file."""
    folder, logits = tiny(name)
    save_gguf(tmp_path / "x.gguf", HFFolder.open(folder), "F32")
    got = families.logits_of(tmp_path, gguf_file="x.gguf")
    assert torch.allclose(got, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gemma2", "deepseek-v3"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantised_blocks_are_the_tensors(name: str, kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """Blocks of a Hugging Face tensor dequantise to what `tensor` gives, and to nearly the original."""
    folder, _ = tiny(name)
    original = HFFolder.open(folder)
    stored = save_gguf(tmp_path / "x.gguf", original, kind)
    assert stored["blk.0.attn_output.weight"] == kind
    assert stored["output_norm.weight"] == "F32"
    source = GGUFSource.open(tmp_path / "x.gguf")
    num_quantised = 0
    for tensor in original.names():
        blocks = source.quantised(tensor)
        got = source.tensor(tensor)
        assert got.shape == original.tensor(tensor).shape == source.shape(tensor)
        bound = {"Q8_0": 0.01, "Q4_0": 0.12}[kind]
        assert (got - original.tensor(tensor)).norm() <= bound * original.tensor(tensor).norm()
        if blocks is not None:
            num_quantised += 1
            assert blocks.kind == kind
            values = torch.from_numpy(blocks.dequantise())
            assert torch.equal(values.t() if source.transposed(tensor) else values, got)
            assert np.array_equal(blocks.planes().dequantise(), blocks.dequantise())
            assert np.array_equal(blocks.planes().for_kernels().dequantise().numpy(), blocks.dequantise())
    assert num_quantised >= 9


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_blocks_are_kept_from_file_to_file(name: str, tiny: Tiny, tmp_path: Path) -> None:
    save_gguf(tmp_path / "1.gguf", HFFolder.open(tiny(name)[0]), "Q4_0", overrides={"token_embd.weight": "Q8_0"})
    save_gguf(tmp_path / "2.gguf", GGUFSource.open(tmp_path / "1.gguf"))
    first, second = GGUFFile.open(tmp_path / "1.gguf"), GGUFFile.open(tmp_path / "2.gguf")
    assert first.info("token_embd.weight").type.name == "Q8_0"
    assert set(first.tensors) == set(second.tensors)
    for tensor, info in first.tensors.items():
        assert second.info(tensor).type == info.type
        assert np.array_equal(first.tensor_bytes(tensor), second.tensor_bytes(tensor))
    assert {key: field.value for key, field in first.metadata.items() if "file_type" not in key} == {
        key: field.value for key, field in second.metadata.items() if "file_type" not in key
    }


def test_bf16_is_kept_and_mapped(tiny: Tiny, tmp_path: Path) -> None:
    original = HFFolder.open(tiny("qwen2")[0])
    save_gguf(tmp_path / "x.gguf", original, "BF16")
    source = GGUFSource.open(tmp_path / "x.gguf")
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = source.tensor(name)
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor, original.tensor(name).bfloat16())
    assert tensor.data_ptr() == source.file.tensor_bytes("blk.1.ffn_down.weight").ctypes.data
    assert source.config()["torch_dtype"] == "bfloat16"


def test_names_are_the_packages(tiny: Tiny, tmp_path: Path) -> None:
    """Every name we write is the one that the format's own tables give."""
    for name in NAMES:
        original = HFFolder.open(tiny(name)[0])
        model_type = original.config()["model_type"]
        family = FAMILIES[model_type]
        number = next(key for key, arch in gguf.MODEL_ARCH_NAMES.items() if arch == family.arch)
        table = gguf.get_tensor_name_map(number, 7)
        for tensor in original.names():
            match = match_hf(family, tensor)
            assert match is not None, tensor
            # The package is given stacked experts and split projections under names of its converter.
            asked = tensor.replace(f"experts.{match.expert}.", "experts.").replace("kv_b_proj", "k_b_proj")
            want = table.get_name(asked, try_suffixes=(".weight", ".bias", "_correction_bias"))
            if want is None or "e_score" in tensor:
                assert match.gguf.split(".", 2)[2] == "exp_probs_b.bias"
                continue
            assert match.gguf == want
            assert match_gguf(family, match.gguf) is not None


def test_q_and_k_rows_are_interleaved() -> None:
    """Row i of a head's first half comes before row i of its second half: pairs that rope turns are neighbours."""
    rows = torch.arange(16)
    order = interleave(16, 2)
    assert rows[order].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(rows[order][deinterleave(16, 2)], rows)


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 5e5), (64, 5e5), (16, 1e4), (8, 5e5)])
@pytest.mark.parametrize(
    ("factor", "low", "high", "old"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 16.0, 4096)]
)
def test_llama3_factors_tell_their_parameters(
    head_dim: int, theta: float, factor: float, low: float, high: float, old: int
) -> None:
    rope = {"rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    factors = llama3_factors({**rope, "original_max_position_embeddings": old}, head_dim)
    found = llama3_parameters(factors, theta, "x")
    again = llama3_factors({**found, "rope_theta": theta}, head_dim)
    assert np.allclose(again, factors, rtol=1e-4)


def test_other_factors_are_refused() -> None:
    with pytest.raises(FormatError, match="Llama 3's rule"):
        llama3_parameters(np.linspace(1, 9, 64, dtype=np.float32), 5e5, "x.gguf")
    with pytest.raises(FormatError, match="Llama 3's rule"):
        llama3_parameters(np.full(64, np.nan, np.float32), 5e5, "x.gguf")


def metadata(**changes: object) -> dict:
    base = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.feed_forward_length": 32,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    merged = {**base, **{f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}}
    return {key: value for key, value in merged.items() if value is not None}


def tensor(*shape: int, kind: str = "F32") -> TensorData:
    return TensorData(kind, shape, lambda: quantise(kind, np.ones(shape, np.float32)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_count": None}, "block_count is missing"),
        ({"block_count": "two"}, "num_hidden_layers is 'two'"),
        ({"embedding_length": 0}, "hidden_size is 0"),
        ({"attention__head_count": 1.5}, "num_attention_heads is 1.5"),
        ({"attention__head_count_kv": [1, 2]}, "differs between layers"),
        ({"attention__layer_norm_rms_epsilon": "x"}, "rms_norm_eps"),
        ({"rope__freq_base": -1.0}, "freq_base"),
        ({"rope__scaling__type": "spiral"}, "spiral"),
    ],
)
def test_metadata_that_makes_no_sense(changes: dict, words: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", metadata(**changes), {"token_embd.weight": tensor(10, 32)})
    with pytest.raises(FormatError, match=words):
        GGUFSource.open(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("blk.0.attn_sinks.weight", (2,), "not part of a llama model"),
        ("blk.1.attn_q.weight", (32, 32), "of 1 blocks"),
        ("blk.00.attn_q.weight", (32, 32), "not part"),
        ("blk.0.attn_q.weight", (33, 32), r"shape \[33, 32\]"),
        ("blk.0.attn_q.bias", (2, 32), r"shape \[2, 32\]"),
        ("blk.0.ffn_gate_exps.weight", (3, 32, 32), "not part"),
    ],
)
def test_tensors_that_do_not_belong(name: str, shape: tuple[int, ...], words: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", metadata(), {"token_embd.weight": tensor(10, 32), name: tensor(*shape)})
    with pytest.raises(FormatError, match=words):
        GGUFSource.open(tmp_path / "x.gguf")


def test_experts_must_be_as_many_as_the_metadata_says(tmp_path: Path) -> None:
    experts = {"token_embd.weight": tensor(10, 32), "blk.0.ffn_gate_exps.weight": tensor(3, 32, 32)}
    write_gguf(tmp_path / "x.gguf", metadata(expert_count=4), experts)
    with pytest.raises(FormatError, match=r"shape \[3, 32, 32\]"):
        GGUFSource.open(tmp_path / "x.gguf")


def test_unknown_architectures_and_types(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "lama"}, {})
    with pytest.raises(FormatError, match="did you mean 'llama'"):
        GGUFSource.open(tmp_path / "x.gguf")
    raw = TensorData("IQ1_S", (10, 256), lambda: np.zeros(500, np.uint8))
    write_gguf(tmp_path / "y.gguf", metadata(), {"token_embd.weight": raw})
    source = GGUFSource.open(tmp_path / "y.gguf")
    with pytest.raises(FormatError, match="IQ1_S, which is not read"):
        source.tensor("model.embed_tokens.weight")
    with pytest.raises(InputError, match="did you mean"):
        source.tensor("model.embed_tokens")


def test_special_ids_and_sampling_defaults(tmp_path: Path) -> None:
    fields = metadata() | {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 2,
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.token_type": np.array([1, 3], np.int32),
        "tokenizer.ggml.scores": np.array([0.5, -1.0], np.float32),
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
    }
    write_gguf(tmp_path / "x.gguf", fields, {"token_embd.weight": tensor(10, 32)})
    source = GGUFSource.open(tmp_path / "x.gguf")
    assert source.generation_config() == {"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.7, "top_k": 20}
    tokenizer = source.tokenizer()
    assert tokenizer["tokenizer.ggml.tokens"] == ["a", "b"]
    assert tokenizer["tokenizer.ggml.token_type"] == [1, 3]
    assert tokenizer["general.architecture"] == "llama"
    save_gguf(tmp_path / "again.gguf", source)
    before, after = source.file.metadata, GGUFFile.open(tmp_path / "again.gguf").metadata
    for key in tokenizer:
        assert after[key].type is before[key].type
        assert after[key].item_type is before[key].item_type
        assert np.array_equal(after[key].value, before[key].value)
    assert source.config()["vocab_size"] == 10
    assert source.config()["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, "unknown model_type"),
        ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"hidden_act": "relu"}, "always computes silu"),
    ],
)
def test_configs_that_cannot_be_said(change: dict, words: str, tiny: Tiny, tmp_path: Path) -> None:
    source = HFFolder.open(tiny("llama")[0])
    source._config = {**source.config(), "rope_parameters": None, **change}
    with pytest.raises(InputError, match=words):
        save_gguf(tmp_path / "x.gguf", source)
    assert not list(tmp_path.iterdir())
