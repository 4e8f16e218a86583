"""Arrivals, aborts, preemptions, several samples, guesses, new weights, pauses and sleep in random order: no page is
lost, and every text is the one that the oracle computes without an engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import groupby

import pytest

from lockstep.core.request import FinishReason, Request, Sample
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import Policy
from lockstep.engine.engine import Engine, Gate, PauseMode
from lockstep.engine.radix import Eviction
from tests.engine.fake import VOCAB, FakeModel, Oracle, tiny

# The slow suite takes ten thousand and some steps, the fast one a few hundred of each kind.
SHORT, LONG = 300, 2550
MODES = tuple(PauseMode)


class Traffic:
    """Random things done to an engine, and what they must lead to."""

    def __init__(self, engine: Engine, model: FakeModel, rng: random.Random) -> None:
        self.engine, self.model, self.rng = engine, model, rng
        self.oracle = Oracle()
        self.live: dict[str, list[Sample]] = {}
        self.params: dict[str, SamplingParams] = {}
        self.mixed: set[str] = set()
        self.num_samples = 0
        self.num_tokens = 0
        self._prefixes = [tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 70))) for _ in range(4)]

    def arrive(self) -> None:
        rng = self.rng
        prefix = rng.choice(self._prefixes)[: rng.choice((16, 32, 70))]
        prompt = (*prefix, *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))))
        params = SamplingParams(
            max_tokens=rng.randrange(1, 90),
            seed=rng.randrange(50),
            n=rng.choice((1, 1, 1, 2, 4)),
            temperature=rng.choice((0.0, 0.7, 0.05)),
        )
        name = f"r{self.num_samples}"
        salt = rng.choice(("", "", "other"))
        request = Request(id=name, prompt=prompt, params=params, priority=rng.randrange(3), cache_salt=salt)
        self.params[name] = params
        self.live[name] = self.engine.add(request)
        self.num_samples += params.n

    def publish(self) -> None:
        if self.engine.gate is not Gate.OPEN:
            return
        version = self.engine.weights.version + 1

        def update() -> None:
            self.model.version = version

        mode = self.rng.choice(MODES)
        if mode is PauseMode.KEEP:
            # They go on reading keys of the old weights, which no oracle knows.
            self.mixed |= {name for name in self.live if self.has_begun(name)}
        self.engine.publish(version, f"d{version}", mode=mode, update=update)

    def has_begun(self, name: str) -> bool:
        return any(sequence.request.id == name for sequence in self.engine.scheduler.running)

    def disturb(self) -> None:
        """Something rare."""
        what, engine = self.rng.randrange(6), self.engine
        if what < 3 and self.live:
            engine.abort(self.rng.choice(list(self.live)))
        elif what == 3:
            self.publish()
        elif what == 4 and engine.gate is Gate.OPEN:
            engine.sleep()
        elif what == 5 and engine.gate is Gate.OPEN:
            engine.pause(PauseMode.KEEP)

    def check(self, sample: Sample) -> None:
        """Token by token against the oracle, a stretch for each version of the weights."""
        request_params = self.params[sample.request_id]
        done = 0
        for weights, stretch in groupby(sample.versions):
            num = len(list(stretch))
            prompt = (*sample.prompt, *sample.tokens[:done])
            expected = self.oracle.text(prompt, request_params, sample.seed, weights.version, num)
            if sample.request_id not in self.mixed:
                assert sample.tokens[done : done + num] == expected, (sample.request_id, done, weights)
            done += num
        assert len(sample.logprobs) == len(sample.tokens) == done
        ended = bool(sample.tokens) and sample.tokens[-1] == 0
        full = len(sample.tokens) == request_params.max_tokens
        if sample.finish_reason is not FinishReason.ABORT:
            assert sample.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
            assert ended or full
        self.num_tokens += done
        group = self.live[sample.request_id]
        group[:] = [other for other in group if other is not sample]
        if not group:
            del self.live[sample.request_id]


@pytest.mark.usefixtures("fast_draws")
@pytest.mark.parametrize("num_steps", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("seed", "policy", "eviction", "drafts", "pages"),
    [
        (1, Policy.FCFS, Eviction.LRU, 0, 14),
        (2, Policy.PRIORITY, Eviction.LFU, 0, 18),
        (3, Policy.FCFS, Eviction.LFU, 4, 40),
        (4, Policy.PRIORITY, Eviction.LRU, 4, 12),
    ],
)
def test_no_page_is_lost_and_no_text_changes(
    seed: int,
    policy: Policy,
    eviction: Eviction,
    drafts: int,
    pages: int,
    num_steps: int,
    tried: Callable[[str, int], None],
) -> None:
    rng, model = random.Random(seed), FakeModel()
    config = tiny(
        num_pages=pages, max_step_tokens=40, policy=policy, eviction=eviction, max_draft_tokens=drafts, max_queue=200
    )
    engine = Engine(model, None, config)
    traffic = Traffic(engine, model, rng)
    while engine.counters.num_steps < num_steps:
        if rng.random() < 0.2 and engine.num_unfinished < 40:
            traffic.arrive()
        if rng.random() < 0.02:
            traffic.disturb()
        if engine.gate in (Gate.PAUSED, Gate.ASLEEP) and rng.random() < 0.3:
            engine.resume()
        for output in engine.step():
            if output.is_finished:
                traffic.check(output.sample)
        if rng.random() < 0.05:
            assert engine.audit() == []
    if engine.gate in (Gate.PAUSED, Gate.ASLEEP):
        engine.resume()
    while engine.has_work:
        for output in engine.step():
            if output.is_finished:
                traffic.check(output.sample)
    assert traffic.live == {}
    assert engine.audit() == []
    engine.flush_prefixes()
    assert engine.scheduler.pool.num_free == pages
    assert len(traffic.mixed) < len(traffic.params) / 4
    counters = engine.counters
    assert counters.num_finished == traffic.num_samples > num_steps // 5
    assert counters.num_preemptions > num_steps // LONG * 30
    assert counters.num_cached_tokens > num_steps
    assert engine.scheduler.tree.num_evicted > num_steps // 100
    assert (counters.num_accepted_tokens > num_steps // 25) == (drafts > 0)
    tried("engine: steps of fuzz with every text against the oracle and no page lost", counters.num_steps)
    tried("engine: samples of fuzz", traffic.num_samples)
