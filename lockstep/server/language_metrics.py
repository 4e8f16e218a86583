"""`GET /metrics` of a language-model server, in Prometheus' text format."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lockstep.core.request import Sample
from lockstep.engine.engine import Engine
from lockstep.engine.scheduler import Counters
from lockstep.server.metrics import Histogram, RequestMetrics, header, sample

FIRST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
REQUEST_BUCKETS_S = (*FIRST_BUCKETS_S, 300.0, 600.0)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True)
class Snapshot:
    """What the engine says of itself between two steps."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_cached_pages: int
    """Pages that only the prefix cache holds; they are free for whoever needs them."""
    counters: Counters

    @staticmethod
    def of(engine: Engine) -> Snapshot:
        """To be called by the engine's worker."""
        scheduler = engine.scheduler
        return Snapshot(
            len(scheduler.running),
            len(scheduler.waiting),
            engine.plan.num_pages,
            scheduler.pool.num_free,
            scheduler.pool.num_idle,
            Counters(**vars(scheduler.counters)),
        )


class Clock:
    """Times of one request."""

    def __init__(self, metrics: LanguageMetrics) -> None:
        self._metrics = metrics
        self._started = time.monotonic()
        self._last: dict[int, float] = {}

    def tokens(self, index: int, num: int, now: float) -> None:
        """Sample `index` got `num` tokens."""
        if num == 0:
            return
        before = self._last.get(index)
        self._last[index] = now
        if before is None:
            if len(self._last) == 1:
                self._metrics.first_token.add(now - self._started)
            return
        for _ in range(num):
            self._metrics.per_token.add((now - before) / num)


@dataclass
class LanguageMetrics:
    """What the HTTP side counts."""

    requests: RequestMetrics = field(default_factory=lambda: RequestMetrics(REQUEST_BUCKETS_S))
    num_active: int = 0
    """Jobs whose reply is not complete."""
    num_disconnected: int = 0
    """Clients that left before the end of their reply."""
    num_prompt_tokens: int = 0
    num_prompt_cached_tokens: int = 0
    num_generated_tokens: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_BUCKETS_S))
    per_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS_S))

    def clock(self, num_prompt: int) -> Clock:
        """For one request."""
        self.num_prompt_tokens += num_prompt
        return Clock(self)

    def finished(self, sample: Sample) -> None:
        """A sample ended."""
        assert sample.finish_reason is not None
        reason = sample.finish_reason.value
        self.ends[reason] = self.ends.get(reason, 0) + 1
        self.num_generated_tokens += len(sample.tokens)
        self.num_prompt_cached_tokens += sample.num_cached

    def page(self, snapshot: Snapshot | None, *, ready: bool, model: str, num_faults: int = 0) -> str:
        """The whole page; without the engine's part while it loads."""
        lines = self.requests.lines()
        gauges: list[tuple[str, str, float]] = [
            ("ready", "1 if it can generate", int(ready)),
            ("jobs_active", "Requests whose reply is not complete", self.num_active),
            ("engine_faults", "What the last idle check of pages and references found", num_faults),
        ]
        counters: list[tuple[str, str, float]] = [
            ("disconnects_total", "Clients that left before the end of their reply", self.num_disconnected),
            ("prompt_tokens_total", "Tokens of prompts taken in", self.num_prompt_tokens),
            ("generation_tokens_total", "Tokens of finished samples", self.num_generated_tokens),
        ]
        if snapshot is not None:
            gauges += [
                ("sequences_running", "Samples that run", snapshot.num_running),
                ("sequences_waiting", "Samples that wait", snapshot.num_waiting),
                ("kv_pages", "Pages of the key-value cache", snapshot.num_pages),
                ("kv_pages_free", "Pages that hold nothing", snapshot.num_free_pages),
                ("kv_pages_cached", "Pages that only the prefix cache holds", snapshot.num_cached_pages),
            ]
            counts = snapshot.counters
            counters += [
                ("engine_steps_total", "Forward passes", counts.num_steps),
                ("engine_computed_tokens_total", "Rows of forward passes", counts.num_computed_tokens),
                ("engine_generated_tokens_total", "Tokens drawn", counts.num_generated_tokens),
                ("prefix_cache_hit_tokens_total", "Tokens that came from the prefix cache", counts.num_cached_tokens),
                ("preemptions_total", "Samples that made room and were computed anew", counts.num_preemptions),
                ("draft_tokens_total", "Tokens guessed ahead", counts.num_draft_tokens),
                ("accepted_tokens_total", "Guesses that were right", counts.num_accepted_tokens),
                (
                    "draft_computed_tokens_total",
                    "Rows of the draft model's forward passes",
                    counts.num_draft_computed_tokens,
                ),
            ]
        for kind, items in (("gauge", gauges), ("counter", counters)):
            for name, text, value in items:
                lines += [*header(f"lockstep_{name}", kind, text), sample(f"lockstep_{name}", value)]
        lines += header("lockstep_samples_total", "counter", "Samples by the reason of their end")
        lines += [sample("lockstep_samples_total", num, reason=reason) for reason, num in self.ends.items()]
        for name, text, histogram in (
            ("lockstep_time_to_first_token_seconds", "From a request to its first token", self.first_token),
            ("lockstep_time_per_token_seconds", "Between a sample's tokens", self.per_token),
        ):
            lines += [*header(name, "histogram", text), *histogram.lines(name, "")]
        lines += [
            *header("lockstep_model_info", "gauge", "The model served"),
            sample("lockstep_model_info", 1, model=model),
        ]
        return "\n".join(lines) + "\n"
