"""Reading a config.json: every field is used, known to change nothing, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lockstep.core.errors import ConfigError
from lockstep.layers.gated import GatedKind
from lockstep.layers.rotary import RopeConfig

# Fields that do not change what a trained decoder computes: bookkeeping, training-time settings, special ids (which the
# tokenizer and the sampler read), and how other software runs the model.
_HARMLESS = frozenset(
    (
        *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        *("use_cache", "initializer_range", "initializer_factor", "pretraining_tp", "gradient_checkpointing"),
        *("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "router_aux_loss_coef", "output_router_logits"),
        *("output_attentions", "output_hidden_states", "return_dict", "torchscript", "chunk_size_feed_forward"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        *("is_decoder", "tokenizer_class", "prefix", "pruned_heads", "tf_legacy_loss", "cross_attention_hidden_size"),
        *("cache_implementation", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        *("tp_plan", "pp_plan", "base_model_tp_plan", "max_length", "min_length", "do_sample", "temperature", "top_k"),
        *("top_p", "typical_p", "repetition_penalty", "length_penalty", "num_beams", "num_beam_groups"),
        *("num_return_sequences", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("use_sdpa", "use_flash_attn", "use_flash_attention_2", "unsloth_fixed", "unsloth_version"),
    )
)

ACTIVATIONS: dict[str, GatedKind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Names in config.json, and ours."""

Word = TypeVar("Word", bound=str)


class ConfigReader:
    """Takes fields one by one; `finish` refuses those nobody took.

    >>> reader = ConfigReader({"hidden_size": 8, "use_alibi": True}, "llama")
    >>> reader.integer("hidden_size")
    8
    >>> reader.finish()
    Traceback (most recent call last):
    ...
    lockstep.core.errors.ConfigError: config.json of a llama model has use_alibi=True, which lockstep does not support
    """

    def __init__(self, values: Mapping[str, Any], family: str) -> None:
        self.values = dict(values)
        self.family = family
        self._taken: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def take(self, name: str) -> Any:
        """The raw value, None where it is missing or null."""
        self._taken.add(name)
        return self.values.get(name)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(self._message(name, value, f"a whole number of at least {minimum}"))
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(self._message(name, value, "a positive number"))
        return float(value)

    def optional_number(self, name: str) -> float:
        """A positive number, or 0.0 where the field is missing or null."""
        if self.has(name):
            return self.number(name)
        self.take(name)
        return 0.0

    def flag(self, name: str, default: bool) -> bool:
        """True or False."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise ConfigError(self._message(name, value, "true or false"))
        return value

    def word(self, name: str, words: Mapping[str, Word], default: str) -> Word:
        """One of `words`, translated."""
        value = self._value(name, default)
        if value not in words:
            raise ConfigError(self._message(name, value, f"one of {', '.join(words)}"))
        return words[value]

    def expect(self, name: str, *allowed: object) -> None:
        """The field is missing, null or one of `allowed`."""
        value = self.take(name)
        if value is not None and value not in allowed:
            raise ConfigError(self._message(name, value, " or ".join(repr(one) for one in allowed)))

    def ignore(self, names: Iterable[str]) -> None:
        """Fields that change nothing in this family."""
        self._taken.update(names)

    def rope(self, max_position: int, *, theta: float = 10_000.0) -> RopeConfig:
        """The rotation, from `rope_parameters` or the older `rope_scaling` and `rope_theta`."""
        theta = self.number("rope_theta", theta)
        scaling = self.take("rope_scaling")
        parameters = self.take("rope_parameters")
        given = dict(scaling or parameters or {})
        partial = self.take("partial_rotary_factor")
        if partial is not None:
            given.setdefault("partial_rotary_factor", partial)
        return RopeConfig.read(given, theta=theta, max_position=max_position)

    def finish(self) -> None:
        """Refuse what is left; null and False are "off" and pass.

        Raises:
            ConfigError: naming the fields.
        """
        left = {
            name: value
            for name, value in self.values.items()
            if name not in self._taken and name not in _HARMLESS and value is not None and value is not False
        }
        if left:
            named = ", ".join(f"{name}={value!r:.60}" for name, value in sorted(left.items()))
            raise ConfigError(f"config.json of a {self.family} model has {named}, which lockstep does not support")

    def _value(self, name: str, default: object) -> Any:
        value = self.take(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"config.json of a {self.family} model has no {name!r}")
        return value

    def _message(self, name: str, got: object, expected: str) -> str:
        return f"config.json of a {self.family} model has {name}={got!r:.60}; expected {expected}"
