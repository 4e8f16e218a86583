"""A tokenizer from the metadata of a GGUF file (keys `tokenizer.ggml.*`), read by whoever opened the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.core.errors import ConfigError, InputError, unknown_name
from lockstep.tokenize.bytepair import LibraryEncoder, build_byte_level, pre_tokenizer
from lockstep.tokenize.sentencepiece import SentencePieceEncoder
from lockstep.tokenize.vocabulary import Kind, Spelling, Vocabulary, end_ids

_PREFIX = "tokenizer.ggml."


def _list(metadata: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> list[Any]:
    """A list of the metadata, which may be absent (then empty); each item is checked."""
    value = metadata.get(_PREFIX + key)
    if value is None:
        return []
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise InputError(f"{_PREFIX}{key} is {type(value).__name__}; expected a list", field=_PREFIX + key)
    # By type first: a vocabulary has hundreds of thousands of items and one type.
    if any(not issubclass(found, kind) for found in set(map(type, value))):
        wrong = next(item for item in value if not isinstance(item, kind))
        raise InputError(f"{_PREFIX}{key} holds {wrong!r}; expected {kind}", field=_PREFIX + key)
    return list(value)


def _index(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    value = metadata.get(_PREFIX + key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise InputError(
            f"{_PREFIX}{key}={value!r} is no id of a vocabulary of {size} tokens; the file is damaged or its "
            "metadata was edited by hand",
            field=_PREFIX + key,
        )
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(_PREFIX + key, default)
    if not isinstance(value, bool):
        raise InputError(f"{_PREFIX}{key}={value!r}; expected true or false", field=_PREFIX + key)
    return value


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    found = {
        key.removeprefix(prefix + "."): str(value) for key, value in metadata.items() if key.startswith(prefix + ".")
    }
    if prefix in metadata:
        found = {"default": str(metadata[prefix]), **found}
    return found


def is_phi3(metadata: Mapping[str, Any]) -> bool:
    """Whether the file's architecture or name says Phi-3."""
    name = str(metadata.get("general.name", "")).lower()
    return metadata.get("general.architecture") == "phi3" or "phi-3" in name or "phi3" in name


def strip_right_ids(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> frozenset[int]:
    """Special tokens that swallow the whitespace after them: Phi-3's; the file does not say so, its tokenizer.json does."""
    if not is_phi3(metadata):
        return frozenset()
    keeps = ("<unk>", "<s>", "<|endoftext|>")
    special = (Kind.CONTROL, Kind.USER_DEFINED)
    return frozenset(i for i, text in enumerate(tokens) if kinds[i] in special and text not in keeps)


def from_metadata(metadata: Mapping[str, Any]) -> tuple[Vocabulary, LibraryEncoder | SentencePieceEncoder]:
    """Vocabulary and encoder of a GGUF file; see `Tokenizer.from_gguf_metadata`."""
    model = metadata.get(_PREFIX + "model")
    if model in (None, "none", "no_vocab"):
        raise ConfigError(
            "the GGUF file has no tokenizer (tokenizer.ggml.model is missing or says none); convert the model again with its "
            "tokenizer beside it, or load its Hugging Face folder"
        )
    if model not in ("gpt2", "llama"):
        raise ConfigError(
            unknown_name("tokenizer.ggml.model", str(model), ["gpt2", "llama"])
            + " (gpt2 is byte-level BPE, llama is SentencePiece)"
        )
    tokens = _list(metadata, "tokens", str)
    if not tokens:
        raise InputError("tokenizer.ggml.tokens is missing or empty; the file has no vocabulary", field="tokens")
    kinds = _list(metadata, "token_type", int) or [Kind.NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise InputError(
            f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens; the file is damaged",
            field="tokenizer.ggml.token_type",
        )
    build = _sentencepiece if model == "llama" else _byte_level
    return build(metadata, tokens, kinds)


def _around(metadata: Mapping[str, Any], size: int, add_bos: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after a text."""
    bos, eos = _index(metadata, "bos_token_id", size), _index(metadata, "eos_token_id", size)
    before = (bos,) if bos is not None and _flag(metadata, "add_bos_token", add_bos) else ()
    after = (eos,) if eos is not None and _flag(metadata, "add_eos_token", False) else ()
    return before, after


def _with_llama_ids(metadata: Mapping[str, Any], kinds: list[int]) -> Mapping[str, Any]:
    """Old SentencePiece files leave out the ids that Llama's own vocabulary has."""
    usual = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    special = (Kind.UNKNOWN, Kind.CONTROL)
    known = {_PREFIX + key: index for key, index in usual.items() if index < len(kinds) and kinds[index] in special}
    return {**known, **metadata}


def _facts(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], add_bos: bool) -> dict[str, Any]:
    size = len(tokens)
    prefix, suffix = _around(metadata, size, add_bos)
    declared = [_index(metadata, f"{name}_token_id", size) for name in ("eos", "eot", "eom")]
    return {
        "tokens": tokens,
        "kinds": kinds,
        "prefix_ids": prefix,
        "suffix_ids": suffix,
        "bos_id": _index(metadata, "bos_token_id", size),
        "eos_ids": end_ids(declared, tokens, kinds),
        "pad_id": _index(metadata, "padding_token_id", size),
        "unk_id": _index(metadata, "unknown_token_id", size),
        "chat_templates": _templates(metadata),
    }


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> tuple[Vocabulary, LibraryEncoder]:
    pre = pre_tokenizer(str(metadata.get(_PREFIX + "pre", "default")))
    merges = _list(metadata, "merges", str)
    if not merges:
        raise InputError(
            "tokenizer.ggml.merges is missing; byte-level BPE cannot join bytes without it", field="merges"
        )
    encoder = LibraryEncoder(build_byte_level(tokens, kinds, merges, pre))
    return Vocabulary(spelling=Spelling.BYTE_LEVEL, **_facts(metadata, tokens, kinds, pre.add_bos)), encoder


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> tuple[Vocabulary, SentencePieceEncoder]:
    scores = _list(metadata, "scores", (int, float))
    if len(scores) != len(tokens):
        raise InputError(
            f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens; SentencePiece needs one each",
            field="tokenizer.ggml.scores",
        )
    wrong = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == Kind.BYTE and not _is_byte(t)), None)
    if wrong is not None:
        raise InputError(f"byte token {wrong!r}; expected <0x00> to <0xFF>", field="tokenizer.ggml.tokens")
    metadata = _with_llama_ids(metadata, kinds)
    space = _flag(metadata, "add_space_prefix", True)
    vocabulary = Vocabulary(
        spelling=Spelling.SENTENCE_PIECE, strip_first_space=space, **_facts(metadata, tokens, kinds, True)
    )
    encoder = SentencePieceEncoder(
        tokens,
        scores,
        kinds,
        unk_id=vocabulary.unk_id,
        add_space_prefix=space,
        strip_right=strip_right_ids(metadata, tokens, kinds),
    )
    return vocabulary, encoder


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">") and _is_hex(token[3:5])


def _is_hex(digits: str) -> bool:
    return all(digit in "0123456789abcdefABCDEF" for digit in digits)
