"""Structured output: which ids may come next, by the `llguidance` package.

# V number of logits (the vocabulary, or more where the model pads it), W = ceil(V / 32) mask words
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from lockstep.core.errors import ConfigError, InputError, MissingExtraError, unknown_name
from lockstep.core.extras import require
from lockstep.tokenize.tokenizer import Tokenizer

# A model that is allowed any amount of blank space between two JSON signs may fill its whole budget with it.
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}
_KINDS = ("json_schema", "json_object", "regex", "choices", "grammar")
_CACHE_ENTRIES = 64
_MASK_SECONDS = 2.0
"""Processor time that the masks of one text may take in all: every other stream waits meanwhile. An honest one takes
microseconds to a millisecond."""
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
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices))


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

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text that goes on from an earlier one."""
        data = text.encode() if isinstance(text, str) else text
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


@final
class GrammarCompiler:
    """Turns specs into matchers for one tokenizer; keeps the last ones compiled.

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
        eos_ids = [index for index in tokenizer.eos_ids if index < self.num_logits]
        if not eos_ids:
            raise ConfigError("structured output needs an eos token among the model's logits, to end the text with")
        if self.num_logits < tokenizer.vocab_size:
            raise ConfigError(f"num_logits={num_logits} for {tokenizer.vocab_size} tokens; expected at least as many")
        wrapper = self._library.TokenizerWrapper(_Vocabulary(tokenizer, self.num_logits))
        self._tokenizer = self._library.LLTokenizer(wrapper, self.num_logits, eos_token=eos_ids)
        self._eos_ids = frozenset(eos_ids)
        self._compiled: OrderedDict[GrammarSpec, Any] = OrderedDict()

    def compile(self, spec: GrammarSpec) -> GrammarMatcher:
        """A matcher at the start of its text.

        Raises:
            InputError: a schema, expression or grammar that is wrong or uses what is not supported; `field` is the
                kind of the spec.
        """
        matcher = self._compiled.get(spec)
        if matcher is None:
            matcher = self._compile(spec)
            self._compiled[spec] = matcher
            if len(self._compiled) > _CACHE_ENTRIES:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(spec)
        return GrammarMatcher(matcher.deep_copy(), self.num_logits, self._eos_ids)

    def _compile(self, spec: GrammarSpec) -> Any:
        try:
            grammar = self._grammar(spec)
        except (InputError, MissingExtraError):
            raise
        except Exception as error:  # the converter of GBNF has its own classes, RecursionError among them
            raise _bad(spec, error) from error
        problem = self._library.LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem and not problem.startswith("WARNING"):
            raise _bad(spec, problem)
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _bad(spec, matcher.get_error())
        return matcher

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
    """Where one text stands in its grammar. Made by `GrammarCompiler.compile`; belongs to one request."""

    def __init__(self, matcher: Any, num_logits: int, eos_ids: frozenset[int], num_ends: int = 0) -> None:
        self._matcher = matcher
        self._num_logits = num_logits
        self._eos_ids = eos_ids
        self._num_ends = num_ends  # eos ids taken after the text was complete, which the library does not count
        self._seconds = 0.0

    def fill_mask(self, out: torch.Tensor) -> None:
        """Write which ids may come next.

        Args:
            out: CPU tensor, contiguous: int32 [W], bit b of word w for id 32 w + b, or bool [V]. Set bits are allowed
                ids; once the text is finished only the eos ids are.

        Raises:
            InputError: a tensor of another shape or dtype, or the grammar became too complex to go on with, or its masks
                have taken 2 s of processor time.
        """
        words = (self._num_logits + 31) // 32
        wanted = {torch.int32: words, torch.bool: self._num_logits}.get(out.dtype)
        if wanted is None or out.shape != (wanted,) or not out.is_contiguous() or out.device.type != "cpu":
            raise InputError(
                f"mask of {out.dtype} {tuple(out.shape)}; expected contiguous CPU int32 [{words}] or bool "
                f"[{self._num_logits}]",
                field="out",
            )
        row_W = out if out.dtype == torch.int32 else torch.empty(words, dtype=torch.int32)
        began = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(row_W.data_ptr(), 4 * words)
        self._seconds += time.thread_time() - began
        self._check()
        if out.dtype == torch.bool:
            bits = torch.arange(32, dtype=torch.int32)
            out.copy_((row_W[:, None] >> bits & 1).bool().flatten()[: self._num_logits])

    def advance(self, index: int) -> bool:
        """Take an id that was generated. False, and nothing changes, if the grammar does not allow it here."""
        if not 0 <= index < self._num_logits:
            return False
        if self._matcher.is_stopped() and not self._matcher.is_error():
            self._num_ends += index in self._eos_ids
            return index in self._eos_ids
        return self._matcher.try_consume_tokens([index]) == 1

    def accepted(self, ids: Sequence[int]) -> int:
        """How many of these ids, from the first on, the grammar would take; for checking drafts."""
        return self._matcher.validate_tokens(list(ids))

    def rollback(self, num_tokens: int) -> None:
        """Take back the last ids."""
        ends = min(num_tokens, self._num_ends)
        self._num_ends -= ends
        if not self._matcher.rollback(num_tokens - ends):
            raise InputError(f"cannot take back {num_tokens} ids: {self._matcher.get_error()}", field="num_tokens")

    def forced_tokens(self) -> list[int]:
        """The ids that must come next whatever the model thinks, to be appended without sampling; often none."""
        return list(self._matcher.compute_ff_tokens())

    @property
    def is_accepting(self) -> bool:
        """Whether the text could end here."""
        return self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but eos can follow."""
        return self._matcher.is_stopped()

    def reset(self) -> None:
        """Back to the start of the text."""
        self._matcher.reset()
        self._num_ends = 0

    def copy(self) -> GrammarMatcher:
        """Another matcher at the same place."""
        return GrammarMatcher(self._matcher.deep_copy(), self._num_logits, self._eos_ids, self._num_ends)

    def _check(self) -> None:
        if self._matcher.is_error():
            problem = self._matcher.get_error().partition("\n<state>")[0]  # the library appends all it knows
            raise InputError(f"the grammar cannot go on: {problem}", field="grammar")
        if self._seconds > _MASK_SECONDS:
            raise InputError(
                f"the grammar cannot go on: its masks took {self._seconds:.1f} s where {_MASK_SECONDS:.0f} are allowed; use "
                "smaller repetitions, such as [a-z]{1,64}",
                field="grammar",
            )
