"""The name that GGUF gives to the way a byte-level tokenizer.json cuts text before merging.

GGUF files carry a name (`tokenizer.ggml.pre`) in place of the rule, so the rule of the folder has to be one that has a name;
another one is an error, because under a wrong name every reader would tokenise silently otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lockstep.core.errors import ConfigError
from lockstep.core.extras import require
from lockstep.tokenize.bytepair import GPT2_EXPRESSION, PRE_TOKENIZERS

# Of names with the same rule the one that converters usually write.
_USUAL = ("llama-bpe", "qwen2", "gpt-2", "starcoder", "gpt-4o")
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"
_ESCAPES = {"\r": r"\r", "\n": r"\n", "\t": r"\t"}
_NEEDLESS = re.compile(r"""\\(["'])""")


def pre_name(description: dict[str, Any]) -> str:
    """The GGUF name of the rule in a tokenizer.json of byte-level BPE.

    Args:
        description: the whole file.

    Raises:
        ConfigError: no name stands for the rule; it is quoted.
    """
    expressions = _expressions(description.get("pre_tokenizer") or {})
    found = _named(expressions)
    if not found and expressions[-1:] == (_DIGIT,) and not _joins_digits(description["model"]["vocab"]):
        # Digits one by one or in runs is all one where no token has two of them.
        found = _named((*expressions[:-1], _DIGITS))
    if not found:
        raise ConfigError(
            f"no GGUF name stands for the way this tokenizer.json cuts text, {' then '.join(expressions)!r}; under another "
            "name readers would give other ids. Serve the folder itself, or keep it as a folder"
        )
    skips_merges = bool(description["model"].get("ignore_merges"))
    fitting = [name for name in found if PRE_TOKENIZERS[name].whole_words == skips_merges]
    if not fitting and _merges_reach_all(description):
        fitting = found
    if not fitting:
        raise ConfigError(
            f"tokenizer.json has ignore_merges={skips_merges}, which GGUF's {found[0]!r} does not, and some of its tokens need "
            "it; no GGUF name stands for both"
        )
    return next((name for name in _USUAL if name in fitting), fitting[0])


def _named(expressions: tuple[str, ...]) -> list[str]:
    return [name for name, pre in PRE_TOKENIZERS.items() if tuple(map(_written, pre.expressions)) == expressions]


def _written(expression: str) -> str:
    """One spelling of what may be spelt with characters or with escapes."""
    bare = _NEEDLESS.sub(r"\1", expression)
    return "".join(_ESCAPES.get(character, character) for character in bare)


def _expressions(pre: dict[str, Any]) -> tuple[str, ...]:
    """The rule as expressions that isolate their matches one after another.

    Raises:
        ConfigError: a step that cannot be put so.
    """
    parts = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    found: list[str] = []
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False} if is_last:
                # In files of before 2023 the key is absent and means true.
                found += [_written(GPT2_EXPRESSION)] if part.get("use_regex", True) else []
            case {"type": "Split", "pattern": {"Regex": str(text)}, "behavior": "Isolated", "invert": False}:
                found.append(_written(text))
            case {"type": "Split", "pattern": {"Regex": str(text)}, "behavior": "Removed", "invert": True}:
                # Keeps what matches; the expressions with a name match every character.
                found.append(_written(text))
            case {"type": "Split", "pattern": {"String": str(text)}, "behavior": "Isolated", "invert": False}:
                found.append(_written(re.escape(text)))
            case {"type": "Digits"}:
                found.append(_DIGIT if part.get("individual_digits") else _DIGITS)
            case _:
                raise ConfigError(f"tokenizer.json cuts text by {part}, which has no counterpart in GGUF")
    return tuple(found)


def _joins_digits(tokens: Iterable[str]) -> bool:
    return any(re.search(r"[0-9]{2}", token) for token in tokens)


def _merges_reach_all(description: dict[str, Any]) -> bool:
    """Whether the merges alone make every token, so that taking whole words first changes nothing."""
    library = require("tokenizers", extra="lm")
    model = description["model"]
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    bare = library.Tokenizer(library.models.BPE(vocab=model["vocab"], merges=pairs, ignore_merges=False))
    added = {token["content"] for token in description.get("added_tokens") or ()}
    tokens = [token for token in model["vocab"] if token not in added]
    return all(len(row.ids) == 1 for row in bare.encode_batch_fast(tokens, add_special_tokens=False))
