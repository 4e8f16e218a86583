"""How the next token is drawn: the wishes of one request."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from lockstep.core.errors import ConfigError, InputError, unknown_name


class GrammarKind(Enum):
    """Language of a constraint on the generated text."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"


@dataclass(frozen=True, kw_only=True)
class GrammarSpec:
    """A constraint: `text` is the schema as JSON, the expression, the grammar, or the choices as a JSON list."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling. The order of operations: penalties and bias on the logits, bans, grammar, temperature,
    then top-k, top-p, min-p, typical on the probabilities, and a draw by Gumbel-max from noise keyed by (seed, position).

    >>> SamplingParams(temperature=0.0, max_tokens=8).is_greedy
    True
    >>> SamplingParams(top_p=1.5)
    Traceback (most recent call last):
    ...
    lockstep.core.errors.InputError: top_p is 1.5; expected 0 < top_p <= 1
    """

    max_tokens: int | None = None
    """Tokens to generate; None: as many as the context allows."""
    min_tokens: int = 0
    """Tokens before which neither an end-of-sequence token nor a stop may end the text; at most max_tokens."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    """Divides (or multiplies, below 0) the logits of tokens of the prompt and the text (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens of the text."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the text."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, addend)."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these may be drawn; None: all."""
    bad_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    """Words that are not written: of the tokens that spell one, with a space before it and without, the last is banned
    where the text ends in the others. A word that other tokens spell is another word."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; the text is cut before them."""
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    """Same seed, same text, whatever else runs. None: the engine draws one and reports it."""
    n: int = 1
    """Samples of one prompt; sample i draws with a seed derived from (seed, i)."""
    best_of: int | None = None
    """Samples drawn for each request; the n with the highest mean log-probability are returned, the best first, once all
    have ended. None: n."""
    beam_width: int = 0
    """Beams of a beam search, of whose texts the n best are returned once it has ended; 0: tokens are drawn."""
    length_penalty: float = 1.0
    """A beam's text is worth the sum of its log-probabilities / (its number of tokens) ** length_penalty."""
    early_stopping: bool = False
    """A beam search ends when it has `beam_width` texts; else when no beam is better than the worst of them."""
    num_logprobs: int = 0
    """Alternatives reported with each token, beside the token's own."""
    prompt_logprobs: int | None = None
    """Alternatives reported for each token of the prompt; None: no prompt log-probabilities."""
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        _range("temperature", self.temperature, 0.0 <= self.temperature < float("inf"), "a finite number >= 0")
        _range("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "0 < top_p <= 1")
        _range("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "0 <= min_p <= 1")
        _range("typical_p", self.typical_p, 0.0 < self.typical_p <= 1.0, "0 < typical_p <= 1")
        _range("top_k", self.top_k, self.top_k >= 0, "0 (all) or more")
        _range("repetition_penalty", self.repetition_penalty, 0.0 < self.repetition_penalty < float("inf"), "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = {"presence_penalty": self.presence_penalty, "frequency_penalty": self.frequency_penalty}[name]
            _range(name, value, -2.0 <= value <= 2.0, "between -2 and 2")
        if self.max_tokens is not None:
            _range("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more, or None")
        most = self.max_tokens
        bounds = "0 or more" if most is None else f"0 <= min_tokens <= max_tokens={most}"
        _range("min_tokens", self.min_tokens, 0 <= self.min_tokens <= (most or self.min_tokens), bounds)
        _range("n", self.n, self.n >= 1, "1 or more")
        _range("best_of", self.best_of or self.n, (self.best_of or self.n) >= self.n, f"n={self.n} or more, or None")
        _range("length_penalty", self.length_penalty, abs(self.length_penalty) < float("inf"), "a finite number")
        _range("num_logprobs", self.num_logprobs, self.num_logprobs >= 0, "0 or more")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InputError(
                "allowed_token_ids is empty, so no token could be drawn; name at least one, or leave it out to allow all",
                field="allowed_token_ids",
            )
        if any(not word.strip() for word in self.bad_words):
            raise InputError("bad_words holds an empty string or blanks only; expected words", field="bad_words")
        if any(not text for text in self.stop):
            raise InputError("stop holds an empty string; expected non-empty strings", field="stop")
        if self.beam_width:
            self._check_beams()

    def _check_beams(self) -> None:
        _range("beam_width", self.beam_width, self.beam_width >= max(2, self.n), f"0, or at least 2 and n={self.n}")
        plain = SamplingParams()
        for name in ("top_k", "top_p", "min_p", "typical_p", "best_of", "stop", "num_logprobs"):
            got = vars(self)[name]
            if got != vars(plain)[name]:
                raise InputError(f"a beam search takes no {name}; got {got}, leave it out", field=name)
        _range(
            "temperature", self.temperature, self.temperature in (0.0, 1.0), "0 or 1 in a beam search, which draws none"
        )

    @property
    def num_sequences(self) -> int:
        """Sequences that run for a request."""
        return self.beam_width or self.best_of or self.n

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @staticmethod
    def from_dict(values: dict[str, Any]) -> SamplingParams:
        """From plain values, as a recipe or a file holds them.

        Raises:
            ConfigError: unknown key, with the nearest known one.
        """
        known = [field.name for field in fields(SamplingParams)]
        for name in values:
            if name not in known:
                raise ConfigError(unknown_name("sampling parameter", name, known))
        return SamplingParams(**values)


def _range(name: str, got: float, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {got}; expected {expected}", field=name)
