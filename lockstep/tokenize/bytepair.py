"""Byte-level BPE: the pre-tokenising expressions by their GGUF name, and the encoder on the `tokenizers` package."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.core.errors import ConfigError, InputError, unknown_name
from lockstep.core.extras import require
from lockstep.tokenize.vocabulary import Kind, places

GPT2_EXPRESSION = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_ENDINGS}|{_LETTERS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS_SLASH}|{_SPACES}"
_GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_START}{_UPPER}+{_LOWER}*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}|{_SIGNS_SLASH}|{_SPACES}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CJK_V3 = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"

# Letters that have cases, as DeepSeek LLM lists them.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_SIGNS_DEEPSEEK = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"


@dataclass(frozen=True)
class PreTokenizer:
    """Expressions applied one after another, each isolating its matches inside the pieces left by the ones before."""

    expressions: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is taken without asking the merges
    add_bos: bool = False


_DIGITS_THEN_GPT2 = PreTokenizer((r"\p{N}", GPT2_EXPRESSION))
_OF_LLAMA3 = PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)
_OF_QWEN2 = PreTokenizer((_QWEN2,))
_OF_GPT2 = PreTokenizer((GPT2_EXPRESSION,))
_OF_GPT4O = PreTokenizer((_GPT4O,))
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_EXPRESSION, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _OF_GPT2,
    "phi-2": _OF_GPT2,
    "mpt": _OF_GPT2,
    "olmo": _OF_GPT2,
    "exaone4": _OF_GPT2,
    "llama3": _OF_LLAMA3,
    "llama-v3": _OF_LLAMA3,
    "llama-bpe": _OF_LLAMA3,
    "falcon3": _OF_LLAMA3,
    "lfm2": _OF_LLAMA3,
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "glm4": PreTokenizer((_LLAMA3,)),
    "chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2": _OF_QWEN2,
    "deepseek-r1-qwen": _OF_QWEN2,
    "stablelm2": _OF_QWEN2,
    "megrez": _OF_QWEN2,
    "hunyuan": _OF_QWEN2,
    "qwen35": PreTokenizer((_QWEN35,)),
    "deepseek-llm": PreTokenizer((r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?{_SIGNS_DEEPSEEK}", r"\s+$", _CJK, r"\p{N}+")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", _CJK_V3, _DEEPSEEK3)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o": _OF_GPT4O,
    "llama4": _OF_GPT4O,
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2_EXPRESSION, r"[0-9][0-9][0-9]")),
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "command-r": _DIGITS_THEN_GPT2,
    "smollm": _DIGITS_THEN_GPT2,
    "codeshell": _DIGITS_THEN_GPT2,
    "exaone": _DIGITS_THEN_GPT2,
    "minerva-7b": _DIGITS_THEN_GPT2,
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokeniser that a GGUF file names.

    Raises:
        ConfigError: no such name here.
    """
    if name not in PRE_TOKENIZERS:
        raise ConfigError(
            unknown_name("pre-tokeniser (tokenizer.ggml.pre)", name, PRE_TOKENIZERS)
            + ". Load the model from its Hugging Face folder with tokenizer.json instead."
        )
    return PRE_TOKENIZERS[name]


def build_byte_level(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str], pre: PreTokenizer) -> Any:
    """A `tokenizers.Tokenizer` of a byte-level vocabulary.

    Args:
        tokens, kinds: the vocabulary, one entry an id.
        merges: "left right", best first.

    Raises:
        InputError: a merge that is not two tokens, or whose join is none.
    """
    tk = require("tokenizers", extra="lm")
    pairs = []
    for rank, merge in enumerate(merges):
        left, space, right = merge[1:].partition(" ")  # a token may itself begin with a space
        if not space or not right:
            raise InputError(f"merge {rank} is {merge!r}; expected two tokens with a space between", field="merges")
        pairs.append((merge[0] + left, right))
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = tk.models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, ignore_merges=pre.whole_words)
    except Exception as error:  # the package raises the bare class
        raise InputError(f"vocabulary and merges do not fit: {error}", field="merges") from error
    tokenizer = tk.Tokenizer(model)
    steps = [tk.pre_tokenizers.Split(tk.Regex(expression), "isolated") for expression in pre.expressions]
    byte_level = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence([*steps, byte_level])
    added = [
        tk.AddedToken(tokens[index], special=kinds[index] != Kind.USER_DEFINED, normalized=False)
        for index in places(kinds, (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED))
        if tokens[index]
    ]
    tokenizer.add_tokens(added)
    return tokenizer


class LibraryEncoder:
    """Text to ids by a `tokenizers.Tokenizer`.

    The library keeps "special tokens are plain text" as a state of the object, so that meaning gets its own copy instead
    of a switch that another thread could see half way. The copy is made when a text first needs it: one that spells
    no special token reads the same either way.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._parsing = tokenizer
        self._plain: Any = None
        self._lock = threading.Lock()
        special = [token for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._special = [token.content for token in special]
        self._always_copy = any(token.normalized for token in special)  # may match what the text does not spell

    def __reduce__(self) -> tuple[type[LibraryEncoder], tuple[Any]]:
        """Other processes get the library's object; each makes its own copy of it when it needs one."""
        return LibraryEncoder, (self._parsing,)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a text, without bos or eos."""
        return list(self._pick((text,), parse_special).encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]:
        """`encode` of each text, in parallel inside the library."""
        encodings = self._pick(texts, parse_special).encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def _pick(self, texts: Sequence[str], parse_special: bool) -> Any:
        spelt = self._always_copy or any(special in text for text in texts for special in self._special)
        if parse_special or not spelt:
            return self._parsing
        with self._lock:
            if self._plain is None:
                copy = type(self._parsing).from_str(self._parsing.to_str())
                copy.encode_special_tokens = True
                self._plain = copy
        return self._plain
