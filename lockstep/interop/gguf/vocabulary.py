"""The tokenizer of a Hugging Face folder as GGUF metadata.

Two kinds exist in both worlds: byte-level BPE ("gpt2": tokens, merges, a name for the way text is cut) and SentencePiece's
BPE ("llama": tokens with scores, the best join first). A tokenizer.json has merges for the second kind too; the score of a
token is then minus the rank of the first merge that makes it, which is what the merges were made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.core.errors import ConfigError, InputError
from lockstep.interop.gguf.pre_names import pre_name
from lockstep.interop.hf.json_file import read_object
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.vocabulary import END_TEXTS, SPACE_MARK, Kind, Spelling, Vocabulary

_PREFIX = "tokenizer.ggml."
# Ends of a turn that llama.cpp and we know by their text; the three others of END_TEXTS it does not (0.3.36 of its Python
# package, by trying).
_TOLD_BY_TEXT = frozenset(END_TEXTS) - {"<|end_of_turn|>", "<|endofturn|>", "<|EOT|>"}
_SAMPLING = (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p"))


@dataclass
class VocabularyFields:
    """Metadata of a tokenizer, and what it cannot say."""

    fields: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """Sentences for the user."""
    needs_nfc: bool = False
    """Ids are equal for texts in Unicode NFC."""
    spaces_differ: bool = False
    """Ids may differ for texts with special tokens beside spaces."""
    first_space_differs: bool = False
    """Ids may differ for texts that begin with a space."""


def vocabulary_fields(folder: Path, num_rows: int) -> VocabularyFields:
    """What a GGUF file says of the tokenizer in a folder.

    Args:
        folder: with tokenizer.json; tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json and
            chat templates are used when present.
        num_rows: of the model's embedding; readers want as many tokens.

    Raises:
        ConfigError: no tokenizer.json, or one that GGUF has no words for: readers would tokenise otherwise.
        InputError: it is damaged, or does not fit the model.
        MissingExtraError: the `tokenizers` package is not installed.
    """
    vocabulary = Tokenizer.from_folder(folder).vocabulary
    description = read_object(folder / "tokenizer.json")
    kind = description["model"].get("type", "BPE")
    if kind != "BPE":
        raise ConfigError(
            f"tokenizer.json is a {kind} vocabulary; GGUF files of the families here hold BPE, byte-level or with byte fallback"
        )
    made = VocabularyFields({})
    if vocabulary.spelling is Spelling.BYTE_LEVEL:
        _byte_level(description, made)
    elif vocabulary.spelling is Spelling.SENTENCE_PIECE:
        _sentencepiece(description, vocabulary, made)
    else:
        raise ConfigError(f"tokenizer.json spells tokens as {vocabulary.spelling.value}, which GGUF has no kind for")
    _tokens(description, vocabulary, num_rows, made)
    _special(vocabulary, num_rows, made)
    if any(token.get("lstrip") or token.get("rstrip") for token in description.get("added_tokens") or ()):
        made.notes.append("some special tokens swallow the spaces beside them, which GGUF cannot say")
        made.spaces_differ = True
    return made


def sampling_fields(generation: Mapping[str, Any]) -> dict[str, Any]:
    """`general.sampling.*` of what a generation_config.json recommends."""
    found = {gguf: generation.get(hf) for hf, gguf in _SAMPLING}
    numbers = {
        key: value for key, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {f"general.sampling.{key}": value if key == "top_k" else float(value) for key, value in numbers.items()}


def _byte_level(description: dict[str, Any], made: VocabularyFields) -> None:
    normaliser = description.get("normalizer") or {}
    if normaliser.get("type") == "NFC":
        made.notes.append(
            "the folder's tokenizer brings text to Unicode NFC first, which GGUF cannot say: NFC text is equal"
        )
        made.needs_nfc = True
    elif normaliser and normaliser != {"type": "Sequence", "normalizers": []}:
        raise ConfigError(
            f"tokenizer.json changes text by {normaliser}, which GGUF cannot say; keep the model as a folder"
        )
    made.fields |= {
        _PREFIX + "model": "gpt2",
        _PREFIX + "pre": pre_name(description),
        _PREFIX + "merges": [" ".join(pair) for pair in _pairs(description)],
    }


def _pairs(description: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges, of files that write them as one text or as two."""
    found: list[tuple[str, str]] = []
    for merge in description["model"]["merges"]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or " " in parts[0] or " " in parts[1]:
            raise InputError(
                f"tokenizer.json has the merge {merge!r}; expected two tokens without spaces", field="merges"
            )
        found.append((parts[0], parts[1]))
    return found


def _sentencepiece(description: dict[str, Any], vocabulary: Vocabulary, made: VocabularyFields) -> None:
    prefix = _space_prefix(description, made)
    pairs = _pairs(description)
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        first.setdefault(left + right, rank)
    last = len(pairs)
    scores = [-float(first.get(token, last)) for token in vocabulary.tokens]
    made.fields |= {
        _PREFIX + "model": "llama",
        _PREFIX + "pre": "default",
        _PREFIX + "scores": np.asarray(scores, np.float32),
        _PREFIX + "add_space_prefix": prefix,
    }
    made.notes += _other_joins(description, set(pairs))


def _other_joins(description: dict[str, Any], pairs: set[tuple[str, str]]) -> list[str]:
    """A note where the merges lack joins that scores allow: then the two algorithms may cut a text differently."""
    vocab = description["model"]["vocab"]
    added = {token["content"] for token in description.get("added_tokens") or ()}
    for token in vocab:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            is_missing = left in vocab and right in vocab and (left, right) not in pairs
            if is_missing and not added.intersection((token, left, right)):
                return [f"its merges do not join {left!r} and {right!r}, as scores do: rare texts may differ"]
    return []


def _space_prefix(description: dict[str, Any], made: VocabularyFields) -> bool:
    """Whether a space comes before a text.

    Raises:
        ConfigError: spaces are treated in a way that GGUF has no words for.
    """
    normaliser, cut = description.get("normalizer"), description.get("pre_tokenizer")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    # After the spaces are replaced, cutting at spaces cuts nothing.
    cuts_nothing = cut is None or (cut.get("type") == "Split" and cut.get("pattern") == {"String": " "})
    if cuts_nothing and normaliser in (spaces, {"type": "Sequence", "normalizers": [spaces]}):
        return False
    if cuts_nothing and normaliser == {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": SPACE_MARK}, spaces],
    }:
        return True
    if normaliser is None and cut and cut.get("type") == "Metaspace" and cut.get("split", True) is False:
        scheme = cut.get("prepend_scheme", "always")
        if scheme != "never":
            rule = "only before the text, and not" if scheme == "first" else "not"
            made.notes.append(
                f"readers of GGUF put a space before a text and after each special token, the folder's tokenizer {rule} where "
                "one is already"
            )
            made.spaces_differ = made.first_space_differs = True
        return bool(scheme != "never")
    raise ConfigError(
        f"tokenizer.json treats spaces by normalizer {normaliser} and pre_tokenizer {cut}, which GGUF has no words for; keep "
        "the model as a folder"
    )


def _tokens(description: dict[str, Any], vocabulary: Vocabulary, num_rows: int, made: VocabularyFields) -> None:
    """As many tokens and types as the embedding has rows: unused ones fill up, those past its end are left out."""
    ordinary = max(description["model"]["vocab"].values(), default=-1)
    if ordinary >= num_rows:
        raise InputError(
            f"the tokenizer has ids up to {ordinary} and the model's embedding {num_rows} rows; they do not belong together",
            field="vocab_size",
        )
    is_spm = vocabulary.spelling is Spelling.SENTENCE_PIECE
    tokens, kinds = list(vocabulary.tokens[:num_rows]), [int(kind) for kind in vocabulary.kinds[:num_rows]]
    beyond = [token for token in vocabulary.tokens[num_rows:] if token]
    if beyond:
        made.notes.append(f"tokens past the model's embedding are left out: {', '.join(beyond[:5])}")
    normal, user_defined = int(Kind.NORMAL), int(Kind.USER_DEFINED)
    for index, token in enumerate(tokens):
        if not token:
            tokens[index] = f"[PAD{index}]"
        elif is_spm and kinds[index] == normal and _is_byte(token):
            kinds[index] = int(Kind.BYTE)
        elif is_spm and kinds[index] == user_defined:
            # Readers look for these before they replace spaces.
            tokens[index] = token.replace(SPACE_MARK, " ")
    if is_spm and vocabulary.unk_id is not None and vocabulary.unk_id < len(kinds):
        kinds[vocabulary.unk_id] = int(Kind.UNKNOWN)
    missing = range(len(tokens), num_rows)
    made.fields[_PREFIX + "tokens"] = tokens + [f"[PAD{index}]" for index in missing]
    made.fields[_PREFIX + "token_type"] = np.asarray(kinds + [int(Kind.UNUSED)] * len(missing), np.int32)
    if is_spm:
        scores = made.fields[_PREFIX + "scores"][:num_rows]
        fill = np.full(num_rows - len(scores), scores.min(initial=0.0), np.float32)
        made.fields[_PREFIX + "scores"] = np.concatenate([scores, fill])


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _special(vocabulary: Vocabulary, num_rows: int, made: VocabularyFields) -> None:
    """Ids with a role, what goes around a text, and the chat templates."""
    bos, ends = vocabulary.bos_id, [index for index in vocabulary.eos_ids if index < num_rows]
    eos = ends[0] if ends else None
    # Readers know by its text that most of these end a turn; the others need a field, and there are two.
    unknown = [index for index in ends[1:] if vocabulary.tokens[index] not in _TOLD_BY_TEXT]
    if len(unknown) > 2:
        names = ", ".join(vocabulary.tokens[index] for index in unknown[2:])
        made.notes.append(f"GGUF has no field left to say that {names} ends a text")
    ids = {"bos": bos, "eos": eos, "padding": vocabulary.pad_id, "unknown": vocabulary.unk_id}
    ids |= dict(zip(("eot", "eom"), unknown, strict=False))
    for name, index in ids.items():
        if index is not None and index < num_rows:
            made.fields[f"{_PREFIX}{name}_token_id"] = index
    around = {(): False, (bos,): True}, {(): False, (eos,): True}
    for key, found, known in zip(
        ("add_bos_token", "add_eos_token"), (vocabulary.prefix_ids, vocabulary.suffix_ids), around, strict=True
    ):
        if found not in known:
            raise ConfigError(f"the tokenizer puts the ids {list(found)} around a text; GGUF can only say bos and eos")
        made.fields[_PREFIX + key] = known[found]
    for name, source in vocabulary.chat_templates.items():
        made.fields["tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"] = source
    named = [name for name in vocabulary.chat_templates if name != "default"]
    if named:
        made.fields["tokenizer.chat_templates"] = named
