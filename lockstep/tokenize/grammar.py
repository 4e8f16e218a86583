"""Structured output: which ids may come next, by the `llguidance` package.

A grammar of a stranger can take any time and memory, here or at any later token, or end the process (a deep one overflows
the stack): the engine keeps each in a process of its own, by `nursery`. Nothing here needs torch, so that such a process is
small and starts soon.

# V number of logits (the vocabulary, or more where the model pads it), W = ceil(V / 32) mask words
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import ConfigError, InputError, MissingExtraError, unknown_name
from lockstep.core.extras import require
from lockstep.tokenize.tokenizer import Tokenizer

# A model that is allowed any amount of blank space between two JSON signs may fill its whole budget with it.
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}
_KINDS = ("json_schema", "json_object", "regex", "choices", "grammar")
_MASK_SECONDS, _TOKEN_SECONDS = 2.0, 0.01
"""Processor time that the masks of one text may take in all, and more for each of its tokens. An honest one takes
microseconds to a few milliseconds."""
_FORCED_BYTES = 512
"""A text that a grammar forces is cut into tokens so far at a time. The library asks anew at every token, so that the whole
of a long one would cost its length squared."""
_PROBE = "\x02"


@dataclass(frozen=True)
class GrammarSpec:
    """What the output must look like.

    Attributes:
        kind: json_schema, json_object, regex, choices or grammar.
        text: the JSON schema, the expression, a JSON list of the choices, or the grammar (Lark, or GBNF's EBNF, which
            is told by `::=`). Empty for json_object.

    >>> GrammarSpec.choices(["yes", "no"])
    GrammarSpec(kind='choices', text='["yes", "no"]')
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(unknown_name("kind of structured output", self.kind, _KINDS), field="kind")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> GrammarSpec:
        """Of a JSON schema, as an object or its text."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def json_object(cls) -> GrammarSpec:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def regex(cls, expression: str) -> GrammarSpec:
        """Of a regular expression that the whole output must match."""
        return cls("regex", expression)

    @classmethod
    def choices(cls, choices: Sequence[str]) -> GrammarSpec:
        """One of a few texts."""
        return cls("choices", json.dumps(list(choices), ensure_ascii=False))

    @classmethod
    def grammar(cls, text: str) -> GrammarSpec:
        """Of a Lark grammar, or of EBNF as GBNF writes it."""
        return cls("grammar", text)


def _bad(spec: GrammarSpec, problem: object) -> InputError:
    return InputError(f"the {spec.kind} cannot be used: {problem}", field=spec.kind)


def _schema(spec: GrammarSpec) -> str:
    try:
        schema = json.loads(spec.text)
    except (ValueError, RecursionError) as error:
        raise _bad(spec, f"not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise _bad(spec, f"it is {type(schema).__name__}; expected an object")
    return spec.text


def _choices(spec: GrammarSpec) -> str:
    choices = json.loads(spec.text)
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise _bad(spec, f"got {choices!r}; expected a list of one or more texts, none empty")
    # One terminal: thousands of rules side by side would be too many for the parser.
    return "start: CHOICE\nCHOICE: " + " | ".join(
        json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices)
    )


class _Vocabulary:
    """The view of a tokenizer that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, num_logits: int) -> None:
        self._tokenizer = tokenizer
        eos_ids = [index for index in tokenizer.eos_ids if index < num_logits]
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(index) for index in range(num_logits)]
        self.special_token_ids = sorted(tokenizer.special_ids | set(eos_ids))
        self._by_bytes: dict[bytes, int] = {}
        # Far more than the few last tokens that the library takes back because a longer one may follow.
        self._most_bytes = max(_FORCED_BYTES, 8 * max(map(len, self.tokens), default=1))

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text that goes on from an earlier one; of a long text, of its beginning."""
        data = text.encode() if isinstance(text, str) else text
        if len(data) > self._most_bytes:
            data = _whole_characters(data[: self._most_bytes])
        decoded = data.decode("utf-8", errors="replace")
        if decoded.encode() != data:
            return self._greedy(data)
        if not self._tokenizer.vocabulary.strip_first_space:
            return self._tokenizer.encode(decoded, add_special=False, parse_special=False)
        # SentencePiece puts a space before a text: a character that joins with nothing takes it away.
        ids = self._tokenizer.encode(_PROBE + decoded, add_special=False, parse_special=False)
        for start in range(len(ids)):
            if b"".join(self.tokens[index] for index in ids[start:]) == data:
                return ids[start:]
        return self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        if not self._by_bytes:
            special = set(self.special_token_ids)
            self._by_bytes = {token: i for i, token in enumerate(self.tokens) if token and i not in special}
        longest = max(map(len, self._by_bytes), default=1)
        ids, position = [], 0
        while position < len(data):
            sizes = range(min(longest, len(data) - position), 0, -1)
            size = next((n for n in sizes if data[position : position + n] in self._by_bytes), None)
            if size is None:
                break
            ids.append(self._by_bytes[data[position : position + size]])
            position += size
        return ids


def _whole_characters(data: bytes) -> bytes:
    """Without the beginning of a character at the end."""
    start = len(data) - 1
    while start > 0 and len(data) - start < 4 and data[start] & 0xC0 == 0x80:
        start -= 1
    try:
        data[start:].decode()
    except UnicodeDecodeError:
        return data[:start] if data[start] >= 0xC0 else data
    return data


def ending_ids(tokenizer: Tokenizer, num_logits: int) -> list[int]:
    """The eos ids that a model of so many logits can draw.

    Raises:
        ConfigError: there is none, or fewer logits than tokens.
    """
    found = [index for index in tokenizer.eos_ids if index < num_logits]
    if not found:
        raise ConfigError("structured output needs an eos token among the model's logits, to end the text with")
    if num_logits < tokenizer.vocab_size:
        raise ConfigError(f"num_logits={num_logits} for {tokenizer.vocab_size} tokens; expected at least as many")
    return found


@final
class GrammarCompiler:
    """Turns specs into matchers for one tokenizer.

    Args:
        tokenizer: the vocabulary; it must have an eos.
        num_logits: V, where the model's logits are wider than the vocabulary; the extra ids are never allowed.

    Raises:
        ConfigError: no eos, or fewer logits than tokens.
        MissingExtraError: `llguidance` is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, *, num_logits: int | None = None) -> None:
        self._library = require("llguidance", extra="grammar")
        self.num_logits = tokenizer.vocab_size if num_logits is None else num_logits
        eos_ids = ending_ids(tokenizer, self.num_logits)
        wrapper = self._library.TokenizerWrapper(_Vocabulary(tokenizer, self.num_logits))
        self._tokenizer = self._library.LLTokenizer(wrapper, self.num_logits, eos_token=eos_ids)
        self._eos_ids = frozenset(eos_ids)

    def compile(self, spec: GrammarSpec) -> GrammarMatcher:
        """A matcher at the start of its text.

        Raises:
            InputError: a schema, expression or grammar that is wrong or uses what is not supported; `field` is the
                kind of the spec.
        """
        try:
            grammar = self._grammar(spec)
        except (InputError, MissingExtraError):
            raise
        except Exception as error:  # the converter of GBNF has its own classes, RecursionError among them
            raise _bad(spec, error) from error
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _bad(spec, _told(matcher.get_error()))
        return GrammarMatcher(matcher, self.num_logits, self._eos_ids)

    def _grammar(self, spec: GrammarSpec) -> str:
        matcher = self._library.LLMatcher
        if spec.kind == "json_schema":
            return matcher.grammar_from_json_schema(_schema(spec), overrides=_JSON_OPTIONS)
        if spec.kind == "json_object":
            return matcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS)
        if spec.kind == "regex":
            return matcher.grammar_from_regex(spec.text)
        if spec.kind == "choices":
            return matcher.grammar_from_lark(_choices(spec))
        if "::=" in spec.text:
            return matcher.grammar_from_lark(
                require("llguidance.gbnf_to_lark", extra="grammar").gbnf_to_lark(spec.text)
            )
        return matcher.grammar_from_lark(spec.text)


@final
class GrammarMatcher:
    """Where one text stands in its grammar. Made by `GrammarCompiler.compile`; belongs to one request. Copies share what the
    library learns of the grammar, and its limits: what one of them is refused for, all are."""

    def __init__(self, matcher: Any, num_logits: int, eos_ids: frozenset[int], num_ends: int = 0) -> None:
        self._matcher = matcher
        self._num_logits = num_logits
        self._eos_ids = eos_ids
        self._num_ends = num_ends  # eos ids taken after the text was complete, which the library does not count
        self._seconds = 0.0
        self._num_tokens = 0

    @property
    def num_words(self) -> int:
        """W."""
        return (self._num_logits + 31) // 32

    def mask(self) -> NDArray[np.int32]:
        """Which ids may come next: int32 [W], bit b of word w for id 32 w + b; once the text is finished, the eos ids.

        Raises:
            InputError: the grammar became too complex to go on with, or has taken more than 2 s of processor time and 10 ms
                for each token.
        """
        row_W = np.empty(self.num_words, dtype=np.int32)
        with self._timed():
            self._matcher.unsafe_compute_mask_ptr(row_W.ctypes.data, row_W.nbytes)
        self.check()
        return row_W

    def advance(self, index: int) -> bool:
        """Take an id that was generated. False, and nothing changes, if the grammar does not allow it here."""
        if not 0 <= index < self._num_logits:
            return False
        if self._matcher.is_stopped() and not self._matcher.is_error():
            self._num_ends += index in self._eos_ids
            return index in self._eos_ids
        with self._timed():
            taken: int = self._matcher.try_consume_tokens([index])
        self._num_tokens += taken
        return taken == 1

    def rollback(self, num_tokens: int) -> None:
        """Take back the last ids."""
        ends = min(num_tokens, self._num_ends)
        self._num_ends -= ends
        if not self._matcher.rollback(num_tokens - ends):
            raise InputError(f"cannot take back {num_tokens} ids: {self._matcher.get_error()}", field="num_tokens")

    def forced_tokens(self) -> list[int]:
        """The ids that must come next whatever the model thinks, to be appended without sampling; often none, and of a
        long text the first of them."""
        with self._timed():
            return list(self._matcher.compute_ff_tokens())

    @property
    def is_accepting(self) -> bool:
        """Whether the text could end here."""
        return self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but eos can follow. False once it cannot go on."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def reset(self) -> None:
        """Back to the start of the text."""
        self._matcher.reset()
        self._num_ends = 0

    def copy(self) -> GrammarMatcher:
        """Another matcher at the same place."""
        other = GrammarMatcher(self._matcher.deep_copy(), self._num_logits, self._eos_ids, self._num_ends)
        other._seconds, other._num_tokens = self._seconds, self._num_tokens
        return other

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.thread_time()
        yield
        self._seconds += time.thread_time() - began

    def check(self) -> None:
        """Raises InputError where the grammar cannot go on: it became too complex, or took too long."""
        if self._matcher.is_error():
            raise InputError(f"the grammar cannot go on: {_told(self._matcher.get_error())}", field="grammar")
        most = _MASK_SECONDS + _TOKEN_SECONDS * self._num_tokens
        if self._seconds > most:
            raise InputError(
                f"the grammar cannot go on: its masks took {self._seconds:.1f} s where {most:.0f} are allowed; use "
                "smaller repetitions, such as [a-z]{1,64}",
                field="grammar",
            )


def allowed(mask_W: NDArray[np.int32], num_logits: int) -> NDArray[np.bool_]:
    """The bits of a mask as bool [V].

    >>> allowed(np.array([5], dtype=np.int32), 4).tolist()
    [True, False, True, False]
    """
    return np.unpackbits(mask_W.view(np.uint8), count=num_logits, bitorder="little").view(np.bool_)


def _told(error: str) -> str:
    """Without what the library appends: all it knows of its state, and where it panicked."""
    return error.partition("\n<state>")[0].partition("\n<backtrace>")[0]
