"""What is known of a vocabulary apart from how text is cut: kinds, raw bytes, special ids, chat templates."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SPACE_MARK = "▁"  # SentencePiece writes a space so


class Kind(enum.IntEnum):
    """What a token is; the numbers are those of GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Spelling(enum.Enum):
    """How the vocabulary spells the bytes of a normal token."""

    BYTE_LEVEL = "byte-level"  # every byte is one printable character (GPT-2's table)
    SENTENCE_PIECE = "sentencepiece"  # UTF-8 with ▁ for space, <0xE2> for a lone byte
    WORDS = "words"  # tokens are words, joined by one space
    LITERAL = "literal"  # UTF-8 as it stands


# Texts which end a turn or a document in the vocabularies of the supported families: whatever the model's own
# config calls eos, generation must end at these too.
END_TEXTS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|endofturn|>",
    "<|EOT|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek writes wide bars)
    "<EOT>",
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Facts about the ids.

    Attributes:
        tokens: spelling of every id; an id that no token has is "".
        kinds: one `Kind` an id.
        prefix_ids, suffix_ids: what `add_special` puts around a text.
        strip_first_space: the encoder put a space before the text, so decoding takes one away.
        eos_ids: every id that ends generation; the config's own eos first.
        chat_templates: jinja sources by name; the usual one is "default".
    """

    tokens: Sequence[str]
    kinds: Sequence[int]
    spelling: Spelling
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    strip_first_space: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    unk_id: int | None = None
    chat_templates: dict[str, str] = field(default_factory=dict)


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: the printable bytes stand for themselves, the others for code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    for number, byte in enumerate(byte for byte in range(256) if chr(byte) not in table):
        table[chr(256 + number)] = byte
    return table


BYTE_OF_CHARACTER = _byte_characters()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def raw_bytes(token: str, kind: int, spelling: Spelling) -> bytes:
    """The bytes that a token stands for.

    >>> raw_bytes("Ġworld", Kind.NORMAL, Spelling.BYTE_LEVEL)
    b' world'
    >>> raw_bytes("<0xE2>", Kind.BYTE, Spelling.SENTENCE_PIECE)
    b'\\xe2'
    >>> raw_bytes("▁▁", Kind.USER_DEFINED, Spelling.SENTENCE_PIECE)
    b'  '
    """
    if kind == Kind.USER_DEFINED and spelling is Spelling.SENTENCE_PIECE:
        # Gemma's runs of spaces are such tokens.
        return token.replace(SPACE_MARK, " ").encode()
    if kind not in (Kind.NORMAL, Kind.BYTE, Kind.UNUSED) or spelling is Spelling.LITERAL:
        return token.encode()
    if spelling is Spelling.BYTE_LEVEL:
        try:
            return bytes([BYTE_OF_CHARACTER[character] for character in token])
        except KeyError:  # a token that the table cannot spell stands for itself
            return token.encode()
    if spelling is Spelling.WORDS:
        return b" " + token.encode() if token else b""
    found = _BYTE_TOKEN.fullmatch(token)
    if found:
        return bytes([int(found[1], 16)])
    return token.replace(SPACE_MARK, " ").encode()


def places(kinds: Sequence[int], wanted: Sequence[Kind]) -> list[int]:
    """Ids whose kind is one of these, rising.

    >>> places([1, 3, 1, 2], (Kind.UNKNOWN, Kind.CONTROL))
    [1, 3]
    """
    found: list[int] = np.flatnonzero(np.isin(np.asarray(kinds), [int(kind) for kind in wanted])).tolist()
    return found


def end_ids(declared: Sequence[int | None], tokens: Sequence[str], kinds: Sequence[int]) -> tuple[int, ...]:
    """The declared eos ids followed by the special tokens known to end a turn, in order and once each."""
    special = places(kinds, (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN))
    specials = {tokens[index]: index for index in special}
    found = [specials[text] for text in END_TEXTS if text in specials]
    return tuple(dict.fromkeys([*(index for index in declared if index is not None), *found]))
