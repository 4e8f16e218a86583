"""What the user wishes of an engine, and the facts that follow from it with a given model and memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from lockstep.core.batch import PAGE
from lockstep.core.errors import ConfigError, unknown_name
from lockstep.engine.radix import Eviction
from lockstep.kernels.attention import INT4

if TYPE_CHECKING:
    from lockstep.engine.runner import ServedModel

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int4": INT4}


class Policy(Enum):
    """Which waiting request starts first."""

    FCFS = "fcfs"
    PRIORITY = "priority"
    """Lower `Request.priority` first, then first come."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The wishes. `resolve` turns them into an `EnginePlan`."""

    max_sequences: int = 64
    """Sequences that run at the same time."""
    max_step_tokens: int = 512
    """Tokens of a step: those of running texts first, then pieces of prompts, then guesses."""
    max_queue: int = 1024
    """Sequences that may wait; more are refused with ServingError."""
    max_context: int | None = None
    """Prompt and text together; None: as far as the model and the pool reach."""
    num_pages: int | None = None
    """Pages of 16 tokens in the key-value cache; None: as many as fit the memory."""
    kv_dtype: str = "auto"
    """"auto": the model's, with which the trainer's log-probabilities equal the sampler's bit for bit; else float32,
    bfloat16, int8 or int4. The last two round every head of a token to 255 or 16 levels: more context in the memory, at
    log-probabilities that are no longer the trainer's."""
    policy: Policy = Policy.FCFS
    """Who runs first: fcfs, the longest waiting; priority, the least number."""
    prefix_cache: bool = True
    """Keep the pages of finished texts for prompts that begin alike."""
    eviction: Eviction = Eviction.LRU
    """Which kept pages make room: lru, those unused for longest; lfu, those used least often."""
    max_draft_tokens: int | None = None
    """Most tokens guessed ahead, by the draft model where there is one, else by prompt lookup; 0: none. None: 5 with a
    draft model, else 0. The text is the same either way."""
    grammar_timeout_s: float = 10.0
    """Processor time that structured output may take to compile, and for any of its tokens; by the clock, three times as
    long. Other requests go on meanwhile."""
    eos_token_ids: tuple[int, ...] | None = None
    """None: the tokenizer's."""
    seed: int = 0
    """Start of the seeds of requests that bring none."""

    def __post_init__(self) -> None:
        for name, got, least in (
            ("max_sequences", self.max_sequences, 1),
            ("max_queue", self.max_queue, 1),
            ("max_draft_tokens", self.max_draft_tokens, 0),
            ("num_pages", self.num_pages, 1),
            ("max_context", self.max_context, 2),
        ):
            if got is not None and got < least:
                raise ConfigError(f"{name}={got}; expected at least {least}")
        if not 0 < self.grammar_timeout_s < float("inf"):
            raise ConfigError(f"grammar_timeout_s={self.grammar_timeout_s}; expected a number above 0")
        if self.max_step_tokens <= self.max_sequences:
            raise ConfigError(
                f"max_step_tokens={self.max_step_tokens} leaves no room for prompts beside max_sequences="
                f"{self.max_sequences} running texts; use at least {self.max_sequences + PAGE}"
            )
        if self.kv_dtype != "auto" and self.kv_dtype not in KV_DTYPES:
            raise ConfigError(unknown_name("kv_dtype", self.kv_dtype, ["auto", *KV_DTYPES]))


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """The facts."""

    max_sequences: int
    max_step_tokens: int
    max_queue: int
    max_context: int
    num_pages: int
    page_bytes: int
    """Of the draft model too, where there is one."""
    kv_dtype: torch.dtype
    policy: Policy
    prefix_cache: bool
    eviction: Eviction
    max_draft_tokens: int
    has_draft: bool
    grammar_timeout_s: float
    draft_kv_dtype: torch.dtype
    """Of the draft model's keys and values: its own, or as the config says."""
    eos_token_ids: tuple[int, ...]
    seed: int

    @property
    def pages_per_sequence(self) -> int:
        return (self.max_context + PAGE - 1) // PAGE


def resolve(
    config: EngineConfig,
    model: ServedModel,
    memory_bytes: int,
    eos_token_ids: tuple[int, ...] = (),
    draft: ServedModel | None = None,
) -> EnginePlan:
    """Wishes, a model and the memory that the cache may take, made facts.

    Args:
        memory_bytes: for keys and values; not read when the config names `num_pages`.
        eos_token_ids: the tokenizer's, used when the config names none.
        draft: has a page of its own for each of the model's.

    Raises:
        ConfigError: a draft model that shall guess nothing, the memory does not hold a page, or max_context exceeds the
            model's or the pool's.
    """
    dtype, draft_dtype = _kv_dtype(config, model), _kv_dtype(config, draft or model)
    page_bytes = model.new_cache(1, dtype).num_bytes
    if draft is not None:
        page_bytes += draft.new_cache(1, draft_dtype).num_bytes
        if config.max_draft_tokens == 0:
            raise ConfigError("a draft model is given and max_draft_tokens=0: it would guess nothing; leave either out")
    if config.max_context is not None and config.max_context > model.max_context:
        raise ConfigError(f"max_context={config.max_context} exceeds the model's {model.max_context}; use that or less")
    wanted = config.max_context or model.max_context
    if config.num_pages is not None:
        num_pages = config.num_pages
    else:
        # More than every slot at full length would never be used.
        num_pages = min(memory_bytes // page_bytes, config.max_sequences * ((wanted + PAGE - 1) // PAGE))
    if num_pages < 1:
        raise ConfigError(f"{memory_bytes} bytes do not hold a page of {page_bytes} bytes; give the cache more memory")
    if config.max_context is not None and config.max_context > num_pages * PAGE:
        raise ConfigError(
            f"max_context={config.max_context} exceeds the {num_pages} pages of {PAGE} tokens in the cache; "
            f"use {num_pages * PAGE} or less, or more pages"
        )
    return EnginePlan(
        max_sequences=config.max_sequences,
        max_step_tokens=config.max_step_tokens,
        max_queue=config.max_queue,
        max_context=min(wanted, num_pages * PAGE),
        num_pages=num_pages,
        page_bytes=page_bytes,
        kv_dtype=dtype,
        policy=config.policy,
        prefix_cache=config.prefix_cache,
        eviction=config.eviction,
        max_draft_tokens=(
            config.max_draft_tokens if config.max_draft_tokens is not None else 5 if draft is not None else 0
        ),
        has_draft=draft is not None,
        grammar_timeout_s=config.grammar_timeout_s,
        draft_kv_dtype=draft_dtype,
        eos_token_ids=config.eos_token_ids if config.eos_token_ids is not None else eos_token_ids,
        seed=config.seed,
    )


def _kv_dtype(config: EngineConfig, model: ServedModel) -> torch.dtype:
    dtype: torch.dtype = model.precision.kv_dtype if config.kv_dtype == "auto" else KV_DTYPES[config.kv_dtype]
    return dtype
