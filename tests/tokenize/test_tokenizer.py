from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.core.errors import ConfigError, InputError, LockstepError
from lockstep.tokenize.bytepair import PRE_TOKENIZERS
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


@pytest.mark.slow
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


_junk = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=3),
    st.lists(st.one_of(st.text(max_size=3), st.integers(-3, 9), st.floats()), max_size=12),
)  # fmt: skip
_KEYS = [
    *("model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id", "eot_token_id"),
    *("unknown_token_id", "padding_token_id", "add_bos_token", "add_eos_token", "add_space_prefix"),
]


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(["gpt2", "llama"]), st.dictionaries(st.sampled_from(_KEYS), _junk, max_size=4))
def test_hostile_metadata_is_refused_or_works(model: str, junk: dict[str, Any]) -> None:
    spelt = ["<unk>", "<s>", "</s>", "<0x61>", "a", "b", "ab", "Ġ", "▁", "▁a"]
    sound = {
        "model": model,
        "tokens": spelt,
        "scores": [0.0, 0.0, 0.0, 0.0, -3.0, -4.0, -1.0, -5.0, -6.0, -2.0],
        "token_type": [2, 3, 3, 6, 1, 1, 1, 1, 1, 1],
        "merges": ["a b"],
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in {**sound, **junk}.items()}
    try:
        tokenizer = Tokenizer.from_gguf_metadata(metadata)
    except LockstepError:
        return
    ids = tokenizer.encode("ab a</s>é", add_special=True, parse_special=True)
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert isinstance(tokenizer.decode(ids, skip_special=False), str)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_damaged_folders_are_refused_or_work(name: str, tmp_path: Path) -> None:
    _tiny_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    sound = (tmp_path / name).read_bytes()
    draw = random.Random(name)
    for _ in range(25):
        damaged = bytearray(sound)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged))] = draw.choice(b'"{}[]:,1x\\\xff\x00')
        (tmp_path / name).write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        try:
            tokenizer = Tokenizer.from_folder(tmp_path)
        except LockstepError:
            continue
        assert tokenizer.vocab_size > 0


def test_an_id_far_away_does_not_take_all_memory(tmp_path: Path) -> None:
    description = _tiny_folder(tmp_path)
    description["model"]["vocab"]["far"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="damaged"):
        Tokenizer.from_folder(tmp_path)


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


def _spm_folder(path: Path, metadata: dict[str, Any]) -> None:
    """The llama-spm vocabulary as the tokenizer.json that Llama 2 and Mistral models have."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [
        (-scores[index], token[:cut], token[cut:])
        for token, index in vocab.items()
        for cut in range(1, len(token))
        if index > 258 and token[:cut] in vocab and token[cut:] in vocab
    ]
    parts = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    prefix = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    bos = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(0, "<unk>"), _added(1, "<s>"), _added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": prefix},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": bos,
        },
        "decoder": {"type": "Sequence", "decoders": parts},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [f"{left} {right}" for _, left, right in sorted(pairs)],
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(description))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def test_sentencepiece_folder_agrees_with_the_gguf_of_the_same_vocabulary(
    tmp_path: Path, metadata_of: Any, vectors_of: Any, vocabulary_of: Any
) -> None:
    _spm_folder(tmp_path, metadata_of("llama-spm"))
    folder, gguf = Tokenizer.from_folder(tmp_path), vocabulary_of("llama-spm")
    assert (folder.bos_id, folder.eos_ids, folder.vocab_size) == (1, (2,), 32000)
    for text, ids in vectors_of("llama-spm"):
        if not text:
            continue
        assert folder.encode(text, add_special=True, parse_special=True) == [1, *ids]
        assert folder.encode(text, add_special=True, parse_special=False) == [1, *ids]
        assert folder.decode([1, *ids], skip_special=True) == text
        assert folder.decode([1, *ids, 2], skip_special=False) == gguf.decode([1, *ids, 2], skip_special=False)
    assert [folder.token_bytes(i) for i in range(32000)] == [gguf.token_bytes(i) for i in range(32000)]


@pytest.mark.slow
def test_importing_lockstep_imports_no_tokenizer_package() -> None:
    code = (
        "import sys, lockstep, lockstep.tokenize.tokenizer, lockstep.tokenize.chat, lockstep.tokenize.grammar;"
        "print([m for m in ('tokenizers', 'jinja2', 'llguidance', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokeniser_cuts_words_and_loses_nothing(pre: str) -> None:
    tokens = [*CHARACTER_OF_BYTE.values(), "he", "Ġhe"]
    tokenizer = Tokenizer.from_gguf_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["h e", "Ġ he"],
        }
    )
    text = "I'LL go, he's 12345 años\r\n\n  \tщюж 日本語でも カナ한국어!?…\u0301 //x <|a|> \U0001fae0 HelloWorld they've   "
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.encode(" he", add_special=False, parse_special=False) == [257]
