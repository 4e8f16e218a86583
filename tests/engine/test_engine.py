"""What the engine promises, on the model that hashes what it reads from the pages."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lockstep.core.batch import PAGE, ForwardBatch
from lockstep.core.errors import ConfigError, InputError, ServingError
from lockstep.core.request import FinishReason, Request
from lockstep.core.sampling import GrammarKind, GrammarSpec, SamplingParams
from lockstep.engine.config import EngineConfig, Policy, resolve
from lockstep.engine.engine import Engine, Gate, PauseMode
from lockstep.kernels.logprobs import token_logprobs, top_logprobs
from tests.engine.fake import VOCAB, FakeModel, alone, run, tiny


def prompt_of(length: int, salt: int = 1) -> tuple[int, ...]:
    return tuple((salt * 7 + index * index) % VOCAB for index in range(length))


def ask(name: str, length: int, *, salt: int = 1, priority: int = 0, **params: object) -> Request:
    values = {"max_tokens": 20, "seed": 3, "ignore_eos": True} | params
    return Request(id=name, prompt=prompt_of(length, salt), params=SamplingParams(**values), priority=priority)


def test_small_pool_gives_the_texts_of_a_big_one() -> None:
    texts = {}
    for pages in (400, 16):
        engine = Engine(FakeModel(), None, tiny(num_pages=pages, max_sequences=16))
        samples = [engine.add(ask(f"{i}", 20 + 3 * i, salt=i, max_tokens=40))[0] for i in range(16)]
        run(engine)
        texts[pages] = [sample.tokens for sample in samples]
        assert engine.audit() == []
        assert (engine.counters.num_preemptions > 5) == (pages == 16)
    assert texts[16] == texts[400]
    assert texts[16][3] == alone(prompt_of(29, 3), ask("", 1, max_tokens=40).params)[0].tokens


def test_samples_of_a_prompt_compute_it_once() -> None:
    for length in (100, 97, 96, 11, 2):
        engine = Engine(FakeModel(), None, tiny())
        params = SamplingParams(n=4, max_tokens=3, ignore_eos=True, seed=5)
        samples = engine.add(Request(id="a", prompt=prompt_of(length), params=params))
        run(engine)
        # Everybody computes the last token of the prompt, for its logits.
        assert [sample.num_cached for sample in samples] == [0] + [length - 1] * 3, length
        assert engine.counters.num_computed_tokens == length + 3 * 1 + 4 * 2
        assert len({sample.seed for sample in samples}) == 4
        assert [sample.tokens for sample in samples] == [sample.tokens for sample in alone(prompt_of(length), params)]


def test_samples_whose_first_has_ended_share_full_pages_only() -> None:
    engine = Engine(FakeModel(), None, tiny())
    samples = engine.add(ask("a", 100, n=4, max_tokens=1))
    run(engine)
    assert engine.counters.num_computed_tokens == 96 + 4 * 4
    assert [sample.num_cached for sample in samples] == [0, 96, 96, 96]


def test_concurrent_requests_compute_a_shared_prefix_once() -> None:
    engine = Engine(FakeModel(), None, tiny(max_step_tokens=300, max_sequences=32))
    shared = prompt_of(64)
    samples = []
    for i in range(8):
        own = tuple((i + 3 * j) % VOCAB for j in range(10 + i))
        params = SamplingParams(max_tokens=5, seed=i, ignore_eos=True)
        samples += engine.add(Request(id=f"{i}", prompt=shared + own, params=params))
    run(engine)
    own_tokens = sum(10 + i for i in range(8))
    assert engine.counters.num_computed_tokens == 64 + own_tokens + 8 * 4
    for i, sample in enumerate(samples):
        assert sample.tokens == alone(sample.prompt, SamplingParams(max_tokens=5, seed=i, ignore_eos=True))[0].tokens


def test_salts_share_nothing() -> None:
    engine = Engine(FakeModel(), None, tiny())
    for salt in ("a", "b", "a"):
        engine.add(Request(id="r", prompt=prompt_of(50), params=SamplingParams(max_tokens=1), cache_salt=salt))
        run(engine)
    assert engine.counters.num_cached_tokens == 48


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_change_the_number_of_steps_only(temperature: float) -> None:
    texts, steps = [], []
    for drafts in (0, 6):
        engine = Engine(FakeModel(), None, tiny(max_draft_tokens=drafts))
        requests = [ask(f"{i}", 30 + i, salt=i, temperature=temperature, max_tokens=150, seed=i) for i in range(4)]
        samples = [engine.add(request)[0] for request in requests]
        run(engine)
        texts.append([(s.tokens, s.logprobs, s.sampling_logprobs) for s in samples])
        steps.append(engine.counters.num_steps)
        assert engine.audit() == []
    assert texts[0] == texts[1]
    if temperature == 0.0:
        assert steps[1] < steps[0]


@pytest.mark.parametrize("step_tokens", [9, 33, 300])
def test_prompt_logprobs_are_those_of_the_model(step_tokens: int) -> None:
    engine = Engine(FakeModel(), None, tiny(max_step_tokens=step_tokens))
    engine.add(ask("warm", 70, max_tokens=3))
    run(engine)
    samples = engine.add(ask("a", 70, prompt_logprobs=2, n=2, max_tokens=2, num_logprobs=3))
    run(engine)
    model, prompt = FakeModel(), torch.tensor(prompt_of(70))
    batch = ForwardBatch.packed([prompt])
    logits_TV = model.logits(model(batch, model.new_cache(batch.num_pages, torch.float32)))
    expected = token_logprobs(logits_TV[:-1], prompt[1:]).tolist()
    ids, values = top_logprobs(logits_TV[:-1], 2)
    for sample in samples:
        assert sample.prompt_logprobs == [None, *expected]
        found = [[a.token for a in row] for row in sample.prompt_alternatives]
        assert found == [[], *ids.tolist()]
        assert [a.logprob for a in sample.prompt_alternatives[5]] == values[4].tolist()
        assert sample.logprobs[0] == token_logprobs(logits_TV[-1:], torch.tensor(sample.tokens[:1])).item()
        assert [len(row) for row in sample.alternatives] == [3, 3]


def test_first_come_first_served_and_priority() -> None:
    orders = {}
    for policy in Policy:
        engine = Engine(FakeModel(), None, tiny(max_sequences=1, policy=policy))
        for name, priority in (("a", 2), ("b", 1), ("c", 0)):
            engine.add(ask(name, 5, priority=priority, max_tokens=3))
        ended = [output.sample.request_id for _ in range(9) for output in engine.step() if output.is_finished]
        orders[policy] = ended
    assert orders == {Policy.FCFS: ["a", "b", "c"], Policy.PRIORITY: ["c", "b", "a"]}


def test_running_texts_go_on_while_a_long_prompt_comes_in() -> None:
    engine = Engine(FakeModel(), None, tiny(max_step_tokens=16))
    (short,) = engine.add(ask("short", 5, max_tokens=30))
    engine.step()
    (long,) = engine.add(ask("long", 200, max_tokens=1))
    for num in range(2, 12):
        engine.step()
        assert len(short.tokens) == num
        assert long.tokens == []


@pytest.mark.parametrize(
    ("changes", "field", "numbers"),
    [
        (
            {"length": 300},
            "prompt",
            "prompt is too long: 300 tokens > 256 maximum; this model's maximum context length is",
        ),
        ({"length": 100, "max_tokens": 200}, "max_tokens", "200"),
        ({"length": 100, "max_tokens": None, "min_tokens": 157}, "min_tokens", "room for 156 more"),
        ({"length": 5, "max_tokens": 3, "min_tokens": 4}, "min_tokens", "max_tokens=3"),
        ({"length": 5, "allowed_token_ids": ()}, "allowed_token_ids", "at least one"),
        ({"length": 5, "stop": ("x",)}, "stop", "tokenizer"),
        ({"length": 5, "bad_token_ids": (VOCAB,)}, "bad_token_ids", str(VOCAB)),
        ({"length": 5, "allowed_token_ids": (1,), "bad_token_ids": (1,)}, "allowed_token_ids", "one to draw"),
        ({"length": 5, "num_logprobs": VOCAB + 1}, "num_logprobs", str(VOCAB)),
        ({"length": 5, "grammar": GrammarSpec(kind=GrammarKind.REGEX, text="a")}, "grammar", "needs a tokenizer"),
        ({"length": 0}, "prompt", "no tokens"),
    ],
)
def test_impossible_requests_are_refused_with_the_numbers(changes: dict, field: str, numbers: str) -> None:
    engine = Engine(FakeModel(), None, tiny())
    length = changes.pop("length")
    with pytest.raises(InputError, match=numbers) as caught:
        engine.add(ask("a", length, **changes))
    assert caught.value.field == field
    assert not engine.has_work


def test_context_is_what_model_and_pool_hold() -> None:
    engine = Engine(FakeModel(), None, tiny(num_pages=4))
    with pytest.raises(InputError, match="maximum context length is 64 tokens"):
        engine.add(ask("a", 40, max_tokens=25))
    (sample,) = engine.add(ask("a", 40, max_tokens=None))
    run(engine)
    assert len(sample.tokens) == 24


def test_full_queue_refuses_and_takes_all_samples_or_none() -> None:
    engine = Engine(FakeModel(), None, tiny(max_queue=3))
    engine.add(ask("a", 5, n=2))
    with pytest.raises(ServingError, match="max_queue=3"):
        engine.add(ask("b", 5, n=2))
    engine.add(ask("b", 5))
    with pytest.raises(InputError, match="in use"):
        engine.add(ask("b", 5))
    run(engine)
    assert engine.counters.num_finished == 3


class BrokenModel(FakeModel):
    """Logits of NaN after a text that ends in 7."""

    def logits(self, hidden_RE: torch.Tensor) -> torch.Tensor:
        logits_RV = super().logits(hidden_RE)
        logits_RV[hidden_RE[:, 1] == 7] = torch.nan
        return logits_RV


def test_a_row_that_cannot_be_drawn_ends_its_own_sample_only() -> None:
    engine = Engine(BrokenModel(), None, tiny())
    params = SamplingParams(max_tokens=6, seed=1, ignore_eos=True, allowed_token_ids=(3, 4, 5))
    good, bad = (engine.add(Request(id=f"{end}", prompt=(1, 2, end), params=params))[0] for end in (3, 7))
    run(engine)
    assert (bad.finish_reason, bad.tokens) == (FinishReason.ERROR, [])
    assert "nan" in bad.error
    assert good.tokens == alone((1, 2, 3), params)[0].tokens
    assert engine.audit() == []


def test_abort_frees_pages_at_once() -> None:
    engine = Engine(FakeModel(), None, tiny(prefix_cache=False))
    engine.add(ask("a", 50, n=3))
    engine.step()
    assert engine.scheduler.pool.num_free < 200
    assert engine.abort("a")
    assert engine.scheduler.pool.num_free == 200
    outputs = engine.step()
    assert [output.sample.finish_reason for output in outputs] == [FinishReason.ABORT] * 3
    assert not engine.abort("a")
    assert not engine.has_work


def test_ends() -> None:
    engine = Engine(FakeModel(), None, tiny())
    free = alone(prompt_of(9), SamplingParams(max_tokens=60, seed=5, ignore_eos=True))[0].tokens
    assert 0 in free[4:40]
    first = free.index(0)
    params = SamplingParams(max_tokens=60, seed=5)
    (sample,) = engine.add(Request(id="eos", prompt=prompt_of(9), params=params))
    chosen = free[2]
    (stopped,) = engine.add(
        Request(id="id", prompt=prompt_of(9), params=dataclasses.replace(params, stop_token_ids=(chosen,)))
    )
    (later,) = engine.add(Request(id="min", prompt=prompt_of(9), params=dataclasses.replace(params, min_tokens=50)))
    run(engine)
    assert (sample.tokens, sample.stop, sample.finish_reason) == (free[: first + 1], 0, FinishReason.STOP)
    assert (stopped.tokens[-1], stopped.stop) == (chosen, chosen)
    assert len(stopped.tokens) == free.index(chosen) + 1
    assert len(later.tokens) >= 50
    assert 0 not in later.tokens[:50]


def test_a_version_never_reads_prefixes_of_another() -> None:
    model = FakeModel()
    engine = Engine(model, None, tiny())
    params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    for version in range(3):
        if version:
            model.version = version
            assert engine.publish(version, f"digest {version}")
        for _ in range(2):
            (sample,) = engine.add(Request(id="a", prompt=prompt_of(60), params=params))
            run(engine)
            assert sample.tokens == alone(prompt_of(60), params, version=version)[0].tokens
            assert {(w.version, w.digest) for w in sample.versions} == {
                (version, f"digest {version}" if version else "")
            }
        assert sample.num_cached == 48
    with pytest.raises(ConfigError, match="must rise"):
        engine.publish(2, "again")


@pytest.mark.parametrize("mode", list(PauseMode))
def test_publication_while_samples_run(mode: PauseMode) -> None:
    model = FakeModel()
    engine = Engine(model, None, tiny(max_sequences=2))
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    old = [engine.add(Request(id=f"{i}", prompt=prompt_of(20, i), params=params))[0] for i in range(3)]
    for _ in range(5):
        engine.step()

    def update() -> None:
        model.version = 1

    done = engine.publish(1, "new", mode=mode, update=update)
    assert done == (mode is not PauseMode.WAIT)
    assert (model.version == 1) == done
    run(engine)
    versions = [[w.version for w in sample.versions] for sample in old]
    expected = {
        PauseMode.ABORT: [[0] * 5, [0] * 5, []],
        PauseMode.WAIT: [[0] * 12, [0] * 12, [1] * 12],
        PauseMode.KEEP: [[0] * 5 + [1] * 7, [0] * 5 + [1] * 7, [1] * 12],
        PauseMode.RECOMPUTE: [[0] * 5 + [1] * 7, [0] * 5 + [1] * 7, [1] * 12],
    }
    assert versions == expected[mode]
    assert engine.audit() == []
    begun = old[0].tokens[:5]
    assert begun == alone(prompt_of(20, 0), params)[0].tokens[:5]
    rest = alone((*prompt_of(20, 0), *begun), dataclasses.replace(params, max_tokens=7), version=1)[0].tokens
    assert (old[0].tokens[5:] == rest) == (mode is PauseMode.RECOMPUTE)
    # What runs on old keys must not have entered the cache of the new version.
    (sample,) = engine.add(Request(id="after", prompt=prompt_of(20, 0), params=params))
    run(engine)
    assert sample.tokens == alone(prompt_of(20, 0), params, version=1)[0].tokens


def test_pause_and_sleep_lose_nothing() -> None:
    engine = Engine(FakeModel(), None, tiny())
    expected = alone(prompt_of(30), ask("", 1).params)[0].tokens
    (sample,) = engine.add(ask("a", 30))
    engine.step()
    engine.pause()
    assert not engine.has_work
    assert engine.step() == []
    engine.sleep()
    assert engine.gate is Gate.ASLEEP
    assert engine.scheduler.pool.num_free == engine.plan.num_pages
    engine.resume()
    run(engine)
    assert sample.tokens == expected
    assert not engine.pause(PauseMode.WAIT) or engine.gate is Gate.PAUSED


def test_outputs_add_up_to_the_sample() -> None:
    engine = Engine(FakeModel(), None, tiny(max_draft_tokens=4))
    (sample,) = engine.add(ask("a", 30, max_tokens=60, temperature=0.0))
    got: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.first == len(got)
            got += output.sample.tokens[output.first : output.first + output.num]
    assert got == sample.tokens
    assert len(got) == 60


def test_plan_counts_pages_from_memory() -> None:
    model = FakeModel(max_context=100)
    plan = resolve(EngineConfig(max_sequences=4, max_step_tokens=64), model, 10 * 1024 + 5)
    assert (plan.num_pages, plan.page_bytes, plan.max_context) == (10, 1024, 100)
    assert resolve(EngineConfig(max_sequences=4, max_step_tokens=64), model, 1 << 40).num_pages == 4 * 7
    with pytest.raises(ConfigError, match="do not hold a page"):
        resolve(EngineConfig(), model, 100)
    with pytest.raises(ConfigError, match="exceeds the model's 100"):
        resolve(EngineConfig(max_context=101), model, 1 << 20)
    with pytest.raises(ConfigError, match=f"use {2 * PAGE} or less"):
        resolve(EngineConfig(max_context=40, num_pages=2), model, 0)
    with pytest.raises(ConfigError, match="leaves no room"):
        EngineConfig(max_sequences=64, max_step_tokens=64)
    with pytest.raises(ConfigError, match="bfloat16"):
        EngineConfig(kv_dtype="bfloat15")
