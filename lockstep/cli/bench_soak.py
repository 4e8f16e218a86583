"""`lockstep bench soak`: hours of mixed traffic in minutes, and whether memory stays flat, pages stay whole and texts right.

Clients come and go on an `AsyncEngine` whose pool is too small for them: shared prefixes, several samples, best-of, beams,
guesses, priorities, salts, prompt log-probabilities, clients that leave, new weights. Some requests are asked again of a
cold engine that does nothing else; the texts must be equal.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from lockstep.cli.figures import measured_with
from lockstep.core.errors import ConfigError, LockstepError
from lockstep.core.request import Request, Sample
from lockstep.core.sampling import SamplingParams
from lockstep.engine.async_engine import AsyncEngine
from lockstep.engine.config import EngineConfig, Policy
from lockstep.engine.engine import Engine, PauseMode
from lockstep.models.families import build_model

MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
WISHES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"n": 3},
    {"n": 2, "best_of": 4},
    {"beam_width": 3},
    {"prompt_logprobs": 2, "num_logprobs": 3},
    {"repetition_penalty": 1.2, "top_k": 20, "top_p": 0.9},
)
PROMPT, TEXT, PREFIXES = 120, 60, 20
CHECKED = 0.03
LEAVING = 0.15


@dataclass(frozen=True)
class SoakArgs:
    """Serve mixed traffic and watch memory, pages and texts."""

    minutes: float = 10.0
    """How long."""
    clients: int = 24
    """Requests at the same time."""
    pages: int = 100
    """Of the cache: the default holds about a quarter of what the clients ask for."""
    kv_dtype: str = "auto"
    """As the engine's."""
    draft: bool = True
    """A draft model guesses ahead; else prompt lookup does."""
    sample_s: float = 5.0
    """Between two readings of the memory."""
    growth_mib: float = 8.0
    """Memory may grow by this much from the first third to the last."""
    seed: int = 0
    """Of the traffic."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.clients < 1 or self.pages < 40 or self.sample_s <= 0:
            raise ConfigError("minutes and sample_s must be above 0, clients at least 1 and pages at least 40")


@dataclass
class Tally:
    """What has happened so far."""

    num_requests: int = 0
    num_left: int = 0
    num_checked: int = 0
    num_tokens: int = 0
    num_publications: int = 0
    rss_mib: list[float] = field(default_factory=list)


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(SoakArgs, args=list(args), prog="lockstep bench soak")
    figures = asyncio.run(soak(wish))
    console = Console()
    for name, value in figures.items():
        if name != "rss_mib":
            console.print(f"{name:<24} {value}")
    if wish.json is not None:
        wish.json.write_text(json.dumps({"versions": measured_with(), **figures}, indent=2) + "\n")
    if figures["rss_growth_mib"] > wish.growth_mib:
        raise LockstepError(f"memory grew by {figures['rss_growth_mib']} MiB; expected at most {wish.growth_mib}")
    return 0


async def soak(wish: SoakArgs) -> dict[str, Any]:
    """The figures; raises at the first wrong text or lost page."""
    model = build_model(MODEL, seed=wish.seed, dtype="bf16", trainable=False)
    draft = build_model({**MODEL, "num_hidden_layers": 1}, wish.seed, dtype="bf16", trainable=False)
    config = EngineConfig(
        num_pages=wish.pages,
        max_sequences=16,
        max_step_tokens=128,
        max_queue=10_000,
        kv_dtype=wish.kv_dtype,
        policy=Policy.PRIORITY,
        max_draft_tokens=4,
    )
    engine = Engine(model, None, config, draft=draft if wish.draft else None)
    tally, started = Tally(), time.monotonic()
    end = started + 60 * wish.minutes
    async with AsyncEngine(engine) as served:
        clients = [_client(served, wish, tally, number, end) for number in range(wish.clients)]
        await asyncio.gather(_watch(served, wish, tally, end), *clients)
        faults = await served.call(_faults)
    if faults:
        raise LockstepError(f"after the soak: {faults}")
    counters = engine.counters
    third = max(len(tally.rss_mib) // 3, 1)
    early, late = float(np.median(tally.rss_mib[third : 2 * third])), float(np.median(tally.rss_mib[-third:]))
    return {
        "minutes": round((time.monotonic() - started) / 60, 2),
        "requests": tally.num_requests,
        "left_early": tally.num_left,
        "texts_checked_cold": tally.num_checked,
        "tokens": tally.num_tokens,
        "publications": tally.num_publications,
        "steps": counters.num_steps,
        "preemptions": counters.num_preemptions,
        "cached_tokens": counters.num_cached_tokens,
        "pages_evicted": engine.scheduler.tree.num_evicted,
        "guesses": counters.num_draft_tokens,
        "guesses_right": counters.num_accepted_tokens,
        "pages_lost": 0,
        "rss_middle_third_mib": round(early, 2),
        "rss_last_third_mib": round(late, 2),
        "rss_growth_mib": round(late - early, 2),
        "rss_mib": tally.rss_mib,
    }


def _faults(engine: Engine) -> list[str]:
    found = engine.audit()
    engine.flush_prefixes()
    if engine.scheduler.pool.num_free != engine.plan.num_pages:
        found.append(f"{engine.scheduler.pool.num_free} of {engine.plan.num_pages} pages are free")
    return found


async def _watch(served: AsyncEngine, wish: SoakArgs, tally: Tally, end: float) -> None:
    """Reads the memory, audits, and publishes the same weights as a new version now and then."""
    while time.monotonic() < end:
        await asyncio.sleep(min(wish.sample_s, max(end - time.monotonic(), 0.0)))
        gc.collect()
        tally.rss_mib.append(round(_rss_mib(), 2))
        if faults := await served.call(lambda engine: engine.audit()):
            raise LockstepError(f"pages do not add up: {faults}")
        mode = (PauseMode.KEEP, PauseMode.RECOMPUTE, PauseMode.WAIT)[tally.num_publications % 3]
        if await served.call(partial(_publish, mode=mode)):
            tally.num_publications += 1
        if sys.stderr.isatty():
            print(f"\r{tally.num_requests} requests, {tally.rss_mib[-1]:.1f} MiB", end="", file=sys.stderr)


def _publish(engine: Engine, mode: PauseMode) -> bool:
    if engine.gate.value != "open":
        return False
    engine.publish(engine.weights.version + 1, "same", mode=mode)
    return True


async def _client(served: AsyncEngine, wish: SoakArgs, tally: Tally, number: int, end: float) -> None:
    rng = random.Random(wish.seed * 1000 + number)
    shared = random.Random(wish.seed)
    prefixes = [tuple(shared.randrange(1000) for _ in range(PROMPT)) for _ in range(PREFIXES)]
    while time.monotonic() < end:
        prompt = rng.choice(prefixes)[: rng.randrange(PROMPT)] + tuple(
            rng.randrange(1000) for _ in range(rng.randrange(1, 40))
        )
        params = SamplingParams(max_tokens=rng.randrange(1, TEXT), seed=rng.randrange(1000), **rng.choice(WISHES))
        request = Request(
            id=f"{number}-{tally.num_requests}",
            prompt=prompt,
            params=params,
            priority=rng.randrange(3),
            cache_salt=rng.choice(("", "", "tenant")),
        )
        tally.num_requests += 1
        leaves = rng.random() < LEAVING
        samples: dict[int, Sample] = {}
        async with aclosing(served.generate(request)) as outputs:
            async for output in outputs:
                samples[output.sample.index] = output.sample
                tally.num_tokens += output.num
                if leaves and rng.random() < 0.2:
                    tally.num_left += 1
                    break
        if len(samples) == params.n and all(s.finish_reason for s in samples.values()) and rng.random() < CHECKED:
            # By the engine's worker, between two steps: the model is used by one thread at a time.
            await served.call(partial(_check, wish=wish, request=request, samples=samples))
            tally.num_checked += 1


def _check(served: Engine, wish: SoakArgs, request: Request, samples: dict[int, Sample]) -> None:
    """Against a cold engine that has nothing else to do."""
    config = EngineConfig(num_pages=120, kv_dtype=wish.kv_dtype, prefix_cache=False)
    engine = Engine(served.model, None, config)
    expected = engine.add(request)
    while engine.has_work:
        engine.step()
    for sample in expected:
        got = samples[sample.index]
        if (got.tokens, got.logprobs) != (sample.tokens, sample.logprobs):
            raise LockstepError(f"request {request} got {got.tokens}; alone it gets {sample.tokens}")


def _rss_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
