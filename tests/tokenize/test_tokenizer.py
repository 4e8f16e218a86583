from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lockstep.core.errors import ConfigError, InputError
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.vocabulary import CHARACTER_OF_BYTE

NAMES = ["gpt-2", "deepseek-coder", "llama-bpe", "qwen2", "llama-spm", "phi-3"]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_vectors(name: str, vocabulary_of: Any, vectors_of: Any) -> None:
    tokenizer = vocabulary_of(name)
    vectors = vectors_of(name)
    assert len(vectors) == 47
    for text, ids in vectors:
        assert tokenizer.encode(text, add_special=False, parse_special=True) == ids, text
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text
        assert tokenizer.decode(ids, skip_special=True) == text
    texts = [text for text, _ in vectors]
    assert tokenizer.encode_batch(texts, add_special=False, parse_special=True) == [ids for _, ids in vectors]


@pytest.mark.parametrize("name", [*NAMES, "aquila"])
def test_any_text_comes_back(name: str, vocabulary_of: Any, vectors_of: Any) -> None:
    tokenizer = vocabulary_of(name)
    texts = [text for text, _ in vectors_of("gpt-2")] + ["\U0001fae0 龜 👩‍👩‍👧‍👦", "a\r\n\tb  c", "\x00\x7f", "<s>x"]
    for text in texts:
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(ids, skip_special=True) == text


@pytest.mark.parametrize(
    ("name", "bos", "eos", "prefix"),
    [
        ("gpt-2", 50256, (50256,), []),
        ("deepseek-coder", 32013, (32014, 32021), [32013]),
        ("llama-bpe", 128000, (128001, 128009), [128000]),
        ("qwen2", 151643, (151643, 151645), []),
        ("llama-spm", 1, (2,), [1]),
        ("phi-3", 1, (32000, 32007), [1]),
    ],
)
def test_special_ids(name: str, bos: int, eos: tuple[int, ...], prefix: list[int], vocabulary_of: Any) -> None:
    tokenizer = vocabulary_of(name)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (bos, eos)
    bare = tokenizer.encode("Hello", add_special=False, parse_special=False)
    assert tokenizer.encode("Hello", add_special=True, parse_special=False) == prefix + bare


def test_control_tokens_are_text_unless_asked(vocabulary_of: Any) -> None:
    for name, text in (("qwen2", "<|im_start|>user"), ("llama-bpe", "<|eot_id|>x"), ("llama-spm", "</s>x")):
        tokenizer = vocabulary_of(name)
        parsed = tokenizer.encode(text, add_special=False, parse_special=True)
        plain = tokenizer.encode(text, add_special=False, parse_special=False)
        assert any(tokenizer.is_special(index) for index in parsed)
        assert not any(tokenizer.is_special(index) for index in plain)
        assert tokenizer.decode(plain, skip_special=True) == text
        assert tokenizer.decode(parsed, skip_special=False).replace(" ", "") == text


def test_phi3_specials_swallow_the_space_after(vocabulary_of: Any) -> None:
    tokenizer = vocabulary_of("phi-3")
    spaced = tokenizer.encode("<|user|>\nHi<|end|>\n<|assistant|>\n", add_special=False, parse_special=True)
    tight = tokenizer.encode("<|user|>Hi<|end|><|assistant|>", add_special=False, parse_special=True)
    assert spaced == tight == [32010, *tokenizer.encode("Hi", add_special=False, parse_special=False), 32007, 32001]


def test_token_bytes_are_raw(vocabulary_of: Any) -> None:
    spm, byte_level = vocabulary_of("llama-spm"), vocabulary_of("gpt-2")
    assert spm.token_bytes(3 + 0xE2) == b"\xe2"
    assert spm.token_bytes(spm.id_of("▁world")) == b" world"
    assert byte_level.token_bytes(byte_level.id_of("Ġworld")) == b" world"
    assert byte_level.token_bytes(50256) == b"<|endoftext|>"
    assert {byte_level.token_bytes(index) for index in range(256)} == {bytes([byte]) for byte in range(256)}
    assert byte_level.token_bytes(50257) == b""
    with pytest.raises(InputError, match="expected 0 or more"):
        byte_level.token_bytes(-1)


def test_lone_surrogate_is_refused(vocabulary_of: Any) -> None:
    with pytest.raises(InputError, match="surrogate"):
        vocabulary_of("gpt-2").encode("a\ud800", add_special=False, parse_special=False)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, ConfigError, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.tokens": []}, InputError, "no vocabulary"),
        ({"tokenizer.ggml.tokens": "abc"}, InputError, "expected a list"),
        ({"tokenizer.ggml.tokens": [1, 2]}, InputError, "holds 1"),
        ({"tokenizer.ggml.scores": [0.0]}, InputError, "needs one each"),
        ({"tokenizer.ggml.token_type": [1]}, InputError, "damaged"),
        ({"tokenizer.ggml.bos_token_id": 32000}, InputError, "no id"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, InputError, "true or false"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt2"}, ConfigError, "did you mean 'gpt-2'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["ab"]}, InputError, "two tokens"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["§ §"]}, InputError, "do not fit"),
        ({"tokenizer.ggml.model": "gpt2"}, InputError, "merges is missing"),
    ],
)
def test_damaged_metadata_is_named(change: dict[str, Any], error: type, match: str, metadata_of: Any) -> None:
    with pytest.raises(error, match=match):
        Tokenizer.from_gguf_metadata({**metadata_of("llama-spm"), **change})


def _added(index: int, content: str, special: bool = True) -> dict[str, Any]:
    off = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": index, "content": content, "special": special, **off}


def _tiny_folder(path: Path) -> dict[str, Any]:
    """A byte-level tokenizer.json of 256 bytes, a few merges and two control tokens."""
    tokens = [CHARACTER_OF_BYTE[byte] for byte in range(256)] + ["he", "ll", "hell", "Ġw"]
    description = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [_added(260, "<s>"), _added(261, "<|im_end|>"), _added(262, "<tool_call>", special=False)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": ["h e", "l l", "he ll", "Ġ w"],
        },
    }  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(description))
    config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ messages[0].content }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [261, 0]}))
    return description


def test_folder(tmp_path: Path) -> None:
    _tiny_folder(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (263, 260, (261, 0))
    assert tokenizer.chat_template() == "{{ messages[0].content }}"
    text = "hell w<tool_call>é<|im_end|>"
    ids = tokenizer.encode(text, add_special=True, parse_special=True)
    assert ids == [258, 259, 262, 0xC3, 0xA9, 261]  # the file's truncation to 4 is for training and must not act
    assert tokenizer.decode(ids, skip_special=False) == text
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert 261 not in plain
    assert tokenizer.decode(plain, skip_special=True) == text


def test_folder_honours_add_bos(tmp_path: Path) -> None:
    _tiny_folder(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    (tmp_path / "chat_template.jinja").write_text("beside")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("he", add_special=True, parse_special=False) == [260, 256]
    assert tokenizer.chat_template() == "beside"


def test_folder_without_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_folder_agrees_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    _tiny_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>"}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in ("hell w\n\n  he <tool_call>x", "龜 \U0001fae0", "<s>a<|im_end|>", ""):
        ids = ours.encode(text, add_special=True, parse_special=True)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)


def test_importing_lockstep_imports_no_tokenizer_package() -> None:
    code = (
        "import sys, lockstep, lockstep.tokenize.tokenizer, lockstep.tokenize.chat, lockstep.tokenize.grammar;"
        "print([m for m in ('tokenizers', 'jinja2', 'llguidance', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
