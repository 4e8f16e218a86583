"""Which values the fields of a configuration may have. A field is known by its name, which means the same in every
algorithm of control, and in every one of language models but for those that have their whole path here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from lockstep.core.errors import ConfigError, unknown_name


class Rule(NamedTuple):
    """What is allowed, and how an error says it.

    >>> POSITIVE.allows(0.2), POSITIVE.allows(float("nan"))
    (True, False)
    """

    allows: Callable[[Any], bool]
    text: str


def _is_whole(x: object) -> bool:
    return isinstance(x, Integral)


def _is_number(x: object) -> bool:
    return isinstance(x, Real)


COUNT = Rule(lambda x: _is_whole(x) and x >= 1, "at least 1")
INDEX = Rule(lambda x: _is_whole(x) and x >= 0, "0 or more")
POSITIVE = Rule(lambda x: _is_number(x) and x > 0, "a number above 0")
WEIGHT = Rule(lambda x: _is_number(x) and 0 <= x < math.inf, "a finite number, 0 or more")
FINITE = Rule(lambda x: _is_number(x) and math.isfinite(x), "a finite number")
SHARE = Rule(lambda x: _is_number(x) and 0 <= x <= 1, "a number from 0 to 1")
PART = Rule(lambda x: _is_number(x) and 0 < x <= 1, "a number above 0 and at most 1")

_CONTROL = {
    COUNT: "total_steps threads eval_episodes keep_checkpoints num_steps num_epochs minibatch_size batch_size frame_stack "
    "num_critics num_quantiles num_atoms policy_delay target_every hidden_sizes encoder_size recurrent_size",
    INDEX: "seed log_every eval_every final_episodes checkpoint_every",
    POSITIVE: "clip value_clip max_grad_norm target_kl temperature_init max_weight",
    WEIGHT: "learning_rate learning_rate_end adam_eps clip_end value_coef exploration_noise target_noise "
    "target_noise_clip temperature priority_alpha",
    FINITE: "entropy_coef entropy_coef_end log_std_init target_entropy reward_scale",
    SHARE: "gae_lambda epsilon_start epsilon_end exploration_fraction priority_beta",
    PART: "gamma tau",
}
_LANGUAGE = {
    COUNT: "run.total_steps log_every keep_checkpoints width num_layers num_heads hidden vocab_size max_context groups "
    "group_size max_tokens max_turns max_sequences memory_mb minibatches epochs micro_tokens batch k problems samples",
    INDEX: "seed threads eval_every checkpoint_every staleness steps workers top_k overlong_buffer max_length references rank "
    "evaluation.level verifier.memory_mb",
    POSITIVE: "temperature beta tau timeout_s start_s worker_timeout_s worker_start_s alpha",
    WEIGHT: "evaluation.temperature coef entropy_coef value_coef value_clip low high dual cap floor centre gamma odds_weight "
    "good_weight bad_weight likelihood_weight",
    SHARE: "gae_lambda min_p learn.loss.gamma",
    PART: "top_p",
}
Rules = Mapping[str, Rule]
CONTROL: Rules = {name: rule for rule, names in _CONTROL.items() for name in names.split()}
LANGUAGE: Rules = {name: rule for rule, names in _LANGUAGE.items() for name in names.split()}


def check_ranges(config: Any, rules: Rules, prefix: str = "") -> None:
    """Look at every field of a configuration and of its parts; None is no value and passes.

    Args:
        rules: `CONTROL` or `LANGUAGE`; the whole path of a field goes before its name.

    Raises:
        ConfigError: naming the field, what it has and what it may have.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        name, value = field.name, config.__dict__[field.name]
        if is_dataclass(value):
            check_ranges(value, rules, f"{prefix}{name}.")
            continue
        if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
            raise ConfigError(unknown_name(f"{prefix}{name}", str(value), get_args(hints[name])))
        rule = rules.get(f"{prefix}{name}", rules.get(name))
        if rule is None or value is None:
            continue
        if not all(map(rule.allows, value if isinstance(value, tuple | list) else (value,))):
            raise ConfigError(f"{prefix}{name}={value!r}; expected {rule.text}")
