"""The tokenizer: text to ids and ids to bytes, whichever file the vocabulary came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final

from lockstep.core.errors import InputError
from lockstep.tokenize import folder as folder_files
from lockstep.tokenize import gguf_vocabulary
from lockstep.tokenize.vocabulary import Kind, Vocabulary, places, raw_bytes

_SPECIAL = (Kind.CONTROL, Kind.UNKNOWN)


class Encoder(Protocol):
    """Text to ids, without bos or eos. `parse_special` lets control tokens in the text become their ids."""

    def encode(self, text: str, parse_special: bool) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]: ...


@final
class Tokenizer:
    """A vocabulary with its encoder. Immutable, and safe to use from several threads.

    Decoding is defined by bytes: the text of ids is the UTF-8 reading of their `token_bytes` in a row, a malformed
    sequence read as U+FFFD, less the one space that SentencePiece puts before a text. `IncrementalDecoder` gives the
    same text piece by piece.
    """

    def __init__(self, vocabulary: Vocabulary, encoder: Encoder) -> None:
        self.vocabulary = vocabulary
        self._encoder = encoder
        self._bytes: list[bytes | None] = [None] * len(vocabulary.tokens)
        self._special = frozenset(places(vocabulary.kinds, _SPECIAL))
        self._ids: dict[str, int] | None = None

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read a Hugging Face folder.

        tokenizer.json is needed; tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json
        and the chat template files are used when present.

        Raises:
            ConfigError: no tokenizer.json, or one of a kind that no generating model has.
            InputError: a damaged file.
            MissingExtraError: the `tokenizers` package is not installed.
        """
        return cls(*folder_files.from_folder(Path(path)))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from a GGUF file's metadata as plain Python values (`tokenizer.ggml.*`, `tokenizer.chat_template`).

        Raises:
            ConfigError: a tokenizer model or pre-tokeniser that is not supported.
            InputError: entries missing, of the wrong type, or not fitting each other.
            MissingExtraError: byte-level BPE without the `tokenizers` package.
        """
        return cls(*gguf_vocabulary.from_metadata(metadata))

    @property
    def vocab_size(self) -> int:
        """Number of ids, unassigned ones included; a model's padded logits may have more."""
        return len(self.vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """Id that opens a text, if the vocabulary has one."""
        return self.vocabulary.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends generation: the declared eos first, then ends of turn."""
        return self.vocabulary.eos_ids

    @property
    def pad_id(self) -> int | None:
        """Id declared for padding."""
        return self.vocabulary.pad_id

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Ids of a text.

        Args:
            text: any str.
            add_special: put bos (and eos) around it as the vocabulary declares.
            parse_special: control tokens spelt in the text become their ids; False for text of an untrusted user.

        Raises:
            InputError: the text holds a lone surrogate, which UTF-8 cannot write.
        """
        _check_text(text)
        ids = self._encoder.encode(text, parse_special)
        return [*self.vocabulary.prefix_ids, *ids, *self.vocabulary.suffix_ids] if add_special else ids

    def encode_batch(self, texts: Sequence[str], *, add_special: bool, parse_special: bool) -> list[list[int]]:
        """`encode` of each text; byte-level vocabularies use several threads."""
        for text in texts:
            _check_text(text)
        rows = self._encoder.encode_batch(texts, parse_special)
        if not add_special:
            return rows
        return [[*self.vocabulary.prefix_ids, *row, *self.vocabulary.suffix_ids] for row in rows]

    def decode(self, ids: Iterable[int], *, skip_special: bool, continuing: bool = False) -> str:
        """Text of ids.

        Args:
            ids: token ids; those past the vocabulary (a model's padding rows) stand for no text.
            skip_special: leave control tokens out.
            continuing: the ids go on from an earlier text, so that a first space is real.
        """
        kept = (index for index in ids if not (skip_special and index in self._special))
        data = b"".join(map(self.token_bytes, kept))
        if self.vocabulary.strip_first_space and not continuing and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, index: int) -> bytes:
        """The exact bytes an id stands for, a control token's being its spelling; b"" past the vocabulary.

        Raises:
            InputError: a negative id.
        """
        if index < 0:
            raise InputError(f"token id {index}; expected 0 or more", field="ids")
        if index >= len(self._bytes):
            return b""
        known = self._bytes[index]
        if known is None:
            vocabulary = self.vocabulary
            known = raw_bytes(vocabulary.tokens[index], vocabulary.kinds[index], vocabulary.spelling)
            self._bytes[index] = known
        return known

    def is_special(self, index: int) -> bool:
        """Whether an id is a control token, which `skip_special` leaves out."""
        return index in self._special

    @property
    def special_ids(self) -> frozenset[int]:
        """All control tokens."""
        return self._special

    def id_of(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary file; None if there is none."""
        if self._ids is None:
            self._ids = {spelling: index for index, spelling in enumerate(self.vocabulary.tokens) if spelling}
        return self._ids.get(token)

    def text_of(self, index: int | None) -> str:
        """Spelling of a special id for a chat template; "" for None."""
        return "" if index is None or index >= self.vocab_size else self.vocabulary.tokens[index]

    @property
    def chat_templates(self) -> dict[str, str]:
        """Jinja sources by name."""
        return dict(self.vocabulary.chat_templates)

    def chat_template(self, name: str = "default") -> str | None:
        """One of `chat_templates`; None if the vocabulary brings none of that name."""
        return self.vocabulary.chat_templates.get(name)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"text is {type(text).__name__}; expected str", field="text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text has a lone surrogate at {error.start}; send UTF-8 with whole characters", field="text"
        ) from error
