"""A tokenizer given as GGUF metadata, written as the files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError
from lockstep.core.extras import require
from lockstep.tokenize.bytepair import build_byte_level, pre_tokenizer
from lockstep.tokenize.gguf_vocabulary import strip_right_ids
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.vocabulary import SPACE_MARK, Kind, Spelling, Vocabulary, places

_PREFIX = "tokenizer.ggml."
_ADDED = (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
_PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def write_tokenizer(folder: Path, metadata: Mapping[str, Any], *, max_context: int | None = None) -> Vocabulary:
    """Writes tokenizer.json, tokenizer_config.json and the chat templates into a folder that is there.

    `transformers.AutoTokenizer` reads them as they are (class PreTrainedTokenizerFast), and gives the ids that the GGUF
    file gives.

    Args:
        metadata: plain values by GGUF key, as `GGUFSource.tokenizer()` gives them.
        max_context: tokens the model takes, for `model_max_length`.

    Returns:
        what is known of the vocabulary.

    Raises:
        ConfigError, InputError: as `Tokenizer.from_gguf_metadata`; a vocabulary with rules that tokenizer.json cannot hold.
        MissingExtraError: the `tokenizers` package is not installed.
    """
    vocabulary = Tokenizer.from_gguf_metadata(metadata).vocabulary
    if vocabulary.spelling is Spelling.BYTE_LEVEL:
        description = _byte_level(metadata, vocabulary)
    else:
        description = _sentencepiece(metadata, vocabulary)
    description["post_processor"] = _around(vocabulary)
    library: Any = require("tokenizers", extra="lm")
    try:
        library.Tokenizer.from_str(json.dumps(description)).save(str(folder / "tokenizer.json"))
    except OSError:
        raise
    except Exception as error:  # the package raises the bare class
        if "os error" in str(error):
            raise OSError(str(error)) from error
        raise ConfigError(f"the file's vocabulary cannot be written as a tokenizer.json: {error}") from error
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_context or 1 << 30,
    }
    eos = vocabulary.eos_ids[0] if vocabulary.eos_ids else None
    roles = {"bos": vocabulary.bos_id, "eos": eos, "pad": vocabulary.pad_id, "unk": vocabulary.unk_id}
    config |= {f"{role}_token": vocabulary.tokens[index] for role, index in roles.items() if index is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for name, source in vocabulary.chat_templates.items():
        path = folder / "chat_template.jinja"
        if name != "default":
            if Path(name).name != name:
                raise ConfigError(f"the chat template {name!r} has a name that cannot be a file's")
            path = folder / "additional_chat_templates" / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(source, "utf-8", newline="")
    return vocabulary


def _byte_level(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    pre = pre_tokenizer(str(metadata.get(_PREFIX + "pre", "default")))
    built = build_byte_level(vocabulary.tokens, vocabulary.kinds, list(metadata[_PREFIX + "merges"]), pre)
    description: dict[str, Any] = json.loads(built.to_str())
    for index in _fillers(vocabulary):
        del description["model"]["vocab"][vocabulary.tokens[index]]
    description["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return description


def _fillers(vocabulary: Vocabulary) -> Iterator[int]:
    """Ids that only fill the embedding's rows; a tokenizer.json leaves them out."""
    return (index for index in places(vocabulary.kinds, (Kind.UNUSED,)) if vocabulary.tokens[index] == f"[PAD{index}]")


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    fillers = set(_fillers(vocabulary))
    swallowing = strip_right_ids(metadata, vocabulary.tokens, vocabulary.kinds)
    ids = {token: index for index, token in enumerate(vocabulary.tokens) if index not in fillers}
    bytes_known = any(kind == Kind.BYTE for kind in vocabulary.kinds)
    spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normaliser: dict[str, Any] = spaces
    if vocabulary.strip_first_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        normaliser = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE_MARK}, spaces]}
    unknown = None if vocabulary.unk_id is None else vocabulary.tokens[vocabulary.unk_id]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": vocabulary.tokens[index], "special": vocabulary.kinds[index] != Kind.USER_DEFINED}
            | _PLAIN
            | {"rstrip": index in swallowing}
            for index in places(vocabulary.kinds, _ADDED)
            if vocabulary.tokens[index]
        ],
        "normalizer": normaliser,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": bytes_known,
            "vocab": ids,
            "merges": _merges(vocabulary, list(metadata[_PREFIX + "scores"])),
        },
    }


def _merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens whose join is a token, in the order in which SentencePiece would make them: by falling score of the
    join; among equal ones the leftmost is not told by a rank, and the lower id goes first."""
    joined = (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)
    ids = {token: index for index, token in enumerate(vocabulary.tokens) if vocabulary.kinds[index] in joined}
    found = [
        (-scores[index], index, cut)
        for token, index in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    tokens = vocabulary.tokens
    return [(tokens[index][:cut], tokens[index][cut:]) for _, index, cut in sorted(found)]


def _around(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What puts bos and eos around a text."""
    before, after = vocabulary.prefix_ids, vocabulary.suffix_ids
    if not before and not after:
        return None

    def special(index: int, part: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": vocabulary.tokens[index], "type_id": part}}

    def whole(letter: str, part: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": letter, "type_id": part}}
        return [*(special(i, part) for i in before), text, *(special(i, part) for i in after)]

    names = {
        vocabulary.tokens[index]: {
            "id": vocabulary.tokens[index],
            "ids": [index],
            "tokens": [vocabulary.tokens[index]],
        }
        for index in (*before, *after)
    }
    return {
        "type": "TemplateProcessing",
        "single": whole("A", 0),
        "pair": [*whole("A", 0), *whole("B", 1)],
        "special_tokens": names,
    }
