"""A tokenizer from a Hugging Face folder: tokenizer.json and the small files around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError, InputError
from lockstep.core.extras import require
from lockstep.tokenize.bytepair import LibraryEncoder
from lockstep.tokenize.vocabulary import Kind, Spelling, Vocabulary, end_ids

_PROBE = "a"
_SPARE_IDS = 1 << 17  # unassigned ids that a sound vocabulary may have


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", field=path.name) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}; expected an object", field=path.name)
    return value


def _load_library(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(
            f"no tokenizer.json in {path.parent}; save it there with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(folder), or load a GGUF file"
        )
    tk = require("tokenizers", extra="lm")
    try:
        return tk.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises the bare class
        raise InputError(f"{path} cannot be read as a tokenizer: {error}", field="tokenizer.json") from error


def _state(component: Any) -> dict[str, Any]:
    """The JSON description of a part of a `tokenizers.Tokenizer`; {} for none."""
    return {} if component is None else json.loads(component.__getstate__())


def _parts(state: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return state[key] if state.get("type") == "Sequence" else [state] if state else []


def _spelling(decoder: dict[str, Any]) -> tuple[Spelling, bool]:
    """How tokens spell bytes, and whether decoding takes away a first space."""
    parts = {part["type"]: part for part in _parts(decoder, "decoders")}
    if "ByteLevel" in parts:
        return Spelling.BYTE_LEVEL, False
    if "Metaspace" in parts:
        return Spelling.SENTENCE_PIECE, parts["Metaspace"].get("prepend_scheme", "always") != "never"
    if "ByteFallback" in parts or "Replace" in parts:
        strip = parts.get("Strip", {})
        return Spelling.SENTENCE_PIECE, strip.get("content") == " " and strip.get("start", 0) > 0
    if not parts:
        return Spelling.WORDS, True
    if "Fuse" in parts:
        return Spelling.LITERAL, False
    raise ConfigError(
        f"tokenizer.json has a decoder of {sorted(parts)}; supported are ByteLevel, Metaspace, ByteFallback with "
        "Replace, Fuse, or none. Such a vocabulary belongs to a model that does not generate text"
    )


def _text(value: Any) -> str | None:
    """A special token as the configs write it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name; a file beside the config goes before the config."""
    declared = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    found: dict[str, str] = {}
    if isinstance(declared, str):
        found["default"] = declared
    elif declared is not None:
        found.update(_named_templates(declared))
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _read_text(path)
    if (folder / "chat_template.jinja").is_file():
        found["default"] = _read_text(folder / "chat_template.jinja")
    return found


def _named_templates(declared: Any) -> dict[str, str]:
    try:
        return {str(item["name"]): str(item["template"]) for item in declared}
    except (TypeError, KeyError) as error:
        raise InputError(
            "chat_template in tokenizer_config.json is neither a text nor a list of objects with name and template",
            field="chat_template",
        ) from error


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:  # line ends as they are
            return file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}", field=path.name) from error


def _tokens(library: Any) -> tuple[list[str], list[int]]:
    vocab: dict[str, int] = library.get_vocab(with_added_tokens=True)
    added = library.get_added_tokens_decoder()
    size = 1 + max([*vocab.values(), *added], default=-1)
    if size > 4 * len(vocab) + _SPARE_IDS:
        raise InputError(
            f"tokenizer.json has {len(vocab)} tokens with ids up to {size - 1}; it is damaged", field="vocab"
        )
    tokens, kinds = [""] * size, [int(Kind.UNUSED)] * size
    for token, index in vocab.items():
        tokens[index], kinds[index] = token, int(Kind.NORMAL)
    for index, token in added.items():
        tokens[index] = token.content
        kinds[index] = int(Kind.CONTROL if token.special else Kind.USER_DEFINED)
    return tokens, kinds


def _around(library: Any, config: dict[str, Any], bos: int | None, eos: int | None) -> tuple[list[int], list[int]]:
    """What the post-processor puts around a text; `add_bos_token` and `add_eos_token` of the config overrule it."""
    bare = library.encode(_PROBE, add_special_tokens=False).ids
    full = library.encode(_PROBE, add_special_tokens=True).ids
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    before, after = (full[: starts[0]], full[starts[0] + len(bare) :]) if bare and starts else ([], [])
    if config.get("add_bos_token") is True and bos is not None and before[:1] != [bos]:
        before = [bos, *before]
    if config.get("add_bos_token") is False and before[:1] == [bos]:
        before = before[1:]
    if config.get("add_eos_token") is True and eos is not None and after[-1:] != [eos]:
        after = [*after, eos]
    if config.get("add_eos_token") is False and after[-1:] == [eos]:
        after = after[:-1]
    return before, after


def from_folder(folder: Path) -> tuple[Vocabulary, LibraryEncoder]:
    """Vocabulary and encoder of a folder; see `Tokenizer.from_folder`."""
    library = _load_library(folder / "tokenizer.json")
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    generation, model = _read_json(folder / "generation_config.json"), _read_json(folder / "config.json")
    tokens, kinds = _tokens(library)

    def named(name: str) -> int | None:
        text = _text(config.get(f"{name}_token"))
        if text is not None:
            return library.token_to_id(text)
        declared = _ids(generation.get(f"{name}_token_id")) + _ids(model.get(f"{name}_token_id"))
        return declared[0] if declared else None

    bos, eos = named("bos"), named("eos")
    for index in (bos, eos):
        if index is not None and index < len(kinds) and kinds[index] == Kind.NORMAL:
            kinds[index] = int(Kind.CONTROL)
    before, after = _around(library, config, bos, eos)
    spelling, strip = _spelling(_state(library.decoder))
    declared = [eos, *_ids(generation.get("eos_token_id")), *_ids(model.get("eos_token_id"))]
    vocabulary = Vocabulary(
        tokens=tokens,
        kinds=kinds,
        spelling=spelling,
        strip_first_space=strip,
        prefix_ids=tuple(before),
        suffix_ids=tuple(after),
        bos_id=bos,
        eos_ids=end_ids(declared, tokens, kinds),
        pad_id=named("pad"),
        unk_id=named("unk"),
        chat_templates=_templates(folder, config),
    )
    return vocabulary, LibraryEncoder(library)
