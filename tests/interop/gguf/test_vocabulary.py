"""The tokenizer of a folder as GGUF metadata and back: the same ids, or an error that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.core.errors import ConfigError, InputError
from lockstep.interop.alike import compare_ids
from lockstep.interop.gguf.vocabulary import sampling_fields, vocabulary_fields
from lockstep.interop.hf.tokenizer_files import write_tokenizer
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.vocabulary import CHARACTER_OF_BYTE

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WHOLE = {**LEVEL, "use_regex": True}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def split(expression: str, **changes: Any) -> dict[str, Any]:
    return {**SPLIT, "pattern": {"Regex": expression}, **changes}


def steps(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


DEEPSEEK_CODER = steps(
    split("[\r\n]"),
    split("\\s?\\p{L}+"),
    split("\\s?\\p{P}+"),
    split("[一-龥ࠀ-一가-퟿]+"),
    {"type": "Digits", "individual_digits": True},
    LEVEL,
)


def added(index: int, content: str, special: bool = True, **changes: Any) -> dict[str, Any]:
    off = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": index, "content": content, "special": special, **off, **changes}


def byte_level(folder: Path, pre: dict[str, Any], config: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A tokenizer.json of 256 bytes, a few merges and three added tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [CHARACTER_OF_BYTE[byte] for byte in range(256)] + ["he", "ll", "hell", "Ġw", "Ġhell"]
    model = {
        "type": "BPE",
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["Ġ", "w"], ["Ġ", "hell"]],
        **changes.pop("model", {}),
    }
    description = {
        "version": "1.0",
        "added_tokens": [added(261, "<s>"), added(262, "<|im_end|>"), added(263, "<tool>", special=False)],
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": None,
        "decoder": WHOLE,
        "model": model,
        **changes,
    }
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>", **(config or {})})
    )
    return folder


@pytest.mark.parametrize(
    ("name", "pre", "skips_merges"),
    [
        ("gpt-2", WHOLE, False),
        ("qwen2", steps(split(QWEN2), LEVEL), False),
        ("qwen2", steps(split(QWEN2, behavior="Removed", invert=True), LEVEL), False),
        ("llama-bpe", steps(split(LLAMA3), LEVEL), True),
        ("smaug-bpe", steps(split(LLAMA3), LEVEL), False),
        ("starcoder", steps({"type": "Digits", "individual_digits": True}, WHOLE), False),
        ("deepseek-coder", DEEPSEEK_CODER, False),
        (
            "deepseek-v3",
            steps(split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), split(DEEPSEEK3), LEVEL),
            False,
        ),
    ],
)
def test_the_rule_tells_the_name(name: str, pre: dict[str, Any], skips_merges: bool, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "a", pre, model={"ignore_merges": skips_merges})
    made = vocabulary_fields(folder, 272)
    assert (made.fields["tokenizer.ggml.pre"], made.notes) == (name, [])
    before, after = Tokenizer.from_folder(folder), Tokenizer.from_gguf_metadata(made.fields)
    assert compare_ids(before, after) > 60
    assert made.fields["tokenizer.ggml.tokens"][260:265] == ["Ġhell", "<s>", "<|im_end|>", "<tool>", "[PAD264]"]
    assert made.fields["tokenizer.ggml.token_type"][260:265].tolist() == [1, 3, 3, 4, 5]
    # And back: a folder whose own rule has the same name.
    (tmp_path / "b").mkdir()
    write_tokenizer(tmp_path / "b", made.fields)
    assert compare_ids(before, Tokenizer.from_folder(tmp_path / "b")) > 60
    assert vocabulary_fields(tmp_path / "b", 272).fields["tokenizer.ggml.pre"] == name
    assert not any(
        "PAD" in token for token in json.loads((tmp_path / "b" / "tokenizer.json").read_text())["model"]["vocab"]
    )


@pytest.mark.parametrize(
    ("pre", "changes", "words"),
    [
        (steps(split(QWEN2 + "|x"), LEVEL), {}, "no GGUF name stands for the way"),
        (steps(split(QWEN2), LEVEL), {"normalizer": {"type": "Lowercase"}}, "changes text by"),
        ({**WHOLE, "add_prefix_space": True}, {}, "no counterpart in GGUF"),
        (steps({"type": "Punctuation", "behavior": "Isolated"}, LEVEL), {}, "no counterpart in GGUF"),
        (WHOLE, {"model": {"ignore_merges": True, "merges": ["l l"]}}, "ignore_merges=True"),
        (WHOLE, {"model": {"type": "Unigram"}}, "cannot be read|Unigram"),
        (WHOLE, {"model": {"merges": ["h e l"]}}, "cannot be read|two tokens"),
    ],
)
def test_rules_without_a_name_are_refused(pre: dict[str, Any], changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, InputError), match=words):
        vocabulary_fields(byte_level(tmp_path, pre, **changes), 272)


def test_what_gguf_cannot_say_is_noted(tmp_path: Path) -> None:
    nfc = byte_level(tmp_path / "nfc", WHOLE, normalizer={"type": "NFC"})
    made = vocabulary_fields(nfc, 272)
    assert made.needs_nfc
    assert "NFC" in made.notes[0]
    swallowing = [added(261, "<s>", rstrip=True), added(262, "<|im_end|>"), added(263, "<image>")]
    made = vocabulary_fields(byte_level(tmp_path / "more", WHOLE, added_tokens=swallowing), 263)
    assert made.spaces_differ
    assert any("left out: <image>" in note for note in made.notes)
    with pytest.raises(InputError, match="do not belong together"):
        vocabulary_fields(nfc, 200)
    # Whole words or merges, where merges make every token, is all one.
    reached = byte_level(tmp_path / "reached", WHOLE, model={"ignore_merges": True})
    assert vocabulary_fields(reached, 272).fields["tokenizer.ggml.pre"] == "gpt-2"


def test_roles_and_templates(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "{{ x }}"}, {"name": "tool_use", "template": "{{ y }}"}]
    config = {"add_bos_token": True, "pad_token": "<s>", "chat_template": templates}
    folder = byte_level(tmp_path / "a", WHOLE, config)
    ends = {"eos_token_id": [262, 256, 257, 258], "temperature": 0.6, "top_k": 20, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    made = vocabulary_fields(folder, 264)
    roles = {key[15:-9]: value for key, value in made.fields.items() if key.endswith("_token_id")}
    assert roles == {"bos": 261, "eos": 262, "padding": 261, "eot": 256, "eom": 257}
    assert made.notes == ["GGUF has no field left to say that hell ends a text"]
    assert made.fields["tokenizer.ggml.add_bos_token"] is True
    assert made.fields["tokenizer.chat_templates"] == ["tool_use"]
    assert sampling_fields(ends) == {"general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    (tmp_path / "b").mkdir()
    write_tokenizer(tmp_path / "b", made.fields, max_context=99)
    back = Tokenizer.from_folder(tmp_path / "b")
    assert compare_ids(Tokenizer.from_folder(folder), back) > 60
    assert back.encode("he", add_special=True, parse_special=True) == [261, 256]
    assert back.chat_templates == {"default": "{{ x }}", "tool_use": "{{ y }}"}
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["model_max_length"] == 99
    strange = {**made.fields, "tokenizer.chat_template.../../x": "z"}
    with pytest.raises(ConfigError, match="cannot be a file's"):
        write_tokenizer(tmp_path / "b", strange)


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}
MERGED = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
META = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def sentencepiece(folder: Path, **changes: Any) -> Path:
    """Bytes, some letters and joins; without a space before texts, a run of spaces is an added token, as Gemma has them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "c", "ab", "▁a", "▁ab", "bc", "abc", "▁▁"]
    merges = ["▁ ▁", "a b", "▁ a", "▁a b", "▁ ab", "b c", "ab c", "a bc"]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    is_plain = changes.get("normalizer") == SPACES
    special = [added(index, text) for index, text in enumerate(pieces[:3])]
    description = {
        "version": "1.0",
        "added_tokens": special + ([added(268, "▁▁", special=False)] if is_plain else []),
        "normalizer": PREPEND,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders + ([] if is_plain else strip)},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: index for index, token in enumerate(pieces)},
            "merges": merges,
        },
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({}, True),
        ({"normalizer": SPACES, "pre_tokenizer": MERGED}, False),
        ({"normalizer": None, "pre_tokenizer": META}, True),
        ({"normalizer": None, "pre_tokenizer": {**META, "prepend_scheme": "always"}}, True),
    ],
)
def test_sentencepiece_there_and_back(changes: dict[str, Any], prefix: bool, tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path / "a", **changes)
    made = vocabulary_fields(folder, 272)
    assert made.fields["tokenizer.ggml.add_space_prefix"] is prefix
    assert made.fields["tokenizer.ggml.token_type"][[0, 1, 3, 258, 259, 271]].tolist() == [2, 3, 6, 6, 1, 5]
    assert made.fields["tokenizer.ggml.tokens"][268] == ("▁▁" if prefix else "  ")
    scores = dict(zip(made.fields["tokenizer.ggml.tokens"], made.fields["tokenizer.ggml.scores"].tolist(), strict=True))
    assert scores["ab"] > scores["▁a"] > scores["▁ab"] > scores["bc"] > scores["abc"]
    before, after = Tokenizer.from_folder(folder), Tokenizer.from_gguf_metadata(made.fields)
    assert compare_ids(before, after, special=not made.spaces_differ, first_space=not made.first_space_differs) > 60
    assert made.first_space_differs == bool(changes.get("pre_tokenizer") and prefix)
    for text in ("ab  abc", "abcabc bca", "a    b", "é  "):
        ids = before.encode(text, add_special=True, parse_special=True)
        assert after.encode(text, add_special=True, parse_special=True) == ids
        assert before.decode(ids, skip_special=True) == after.decode(ids, skip_special=True) == text
    (tmp_path / "b").mkdir()
    write_tokenizer(tmp_path / "b", made.fields)
    back = Tokenizer.from_folder(tmp_path / "b")
    assert compare_ids(after, back) > 60
    assert back.encode("ab  abc<s>a", add_special=False, parse_special=True) == after.encode(
        "ab  abc<s>a", add_special=False, parse_special=True
    )


def test_other_ways_with_spaces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="treats spaces by"):
        vocabulary_fields(sentencepiece(tmp_path, pre_tokenizer={**META, "split": True}, normalizer=None), 272)
