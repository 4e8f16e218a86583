"""Best-of and beam search: what is chosen, that choosing depends on nothing but the request, and that no page is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from lockstep.core.errors import InputError
from lockstep.core.request import FinishReason, Request, Sample
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.engine import Engine, PauseMode
from lockstep.engine.ranking import mean_logprob
from lockstep.models.families import build_model
from tests.engine.fake import VOCAB, FakeModel, alone, run, tiny
from tests.engine.test_exact import LLAMA, learner

PROMPT = tuple(range(3, 22))


def answer(engine: Engine, params: SamplingParams, prompt: tuple[int, ...] = PROMPT) -> list[Sample]:
    samples = engine.add(Request(id="a", prompt=prompt, params=params))
    run(engine)
    assert engine.audit() == []
    return samples


def test_best_of_returns_the_most_probable_samples() -> None:
    drawn = alone(PROMPT, SamplingParams(max_tokens=12, seed=5, n=6))
    best = sorted(drawn, key=lambda sample: -mean_logprob(sample))[:2]
    engine = Engine(FakeModel(), None, tiny())
    request = Request(id="a", prompt=PROMPT, params=SamplingParams(max_tokens=12, seed=5, n=2, best_of=6))
    samples = engine.add(request)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [sample.tokens for sample in samples] == [sample.tokens for sample in best]
    assert [sample.index for sample in samples] == [0, 1]
    assert [sample.logprobs for sample in samples] == [sample.logprobs for sample in best]
    # All of a text comes at once, when it is known to be among the best.
    assert [(output.sample.index, output.first, output.num) for output in outputs] == [
        (index, 0, len(sample.tokens)) for index, sample in enumerate(samples)
    ]


def beam_reference(model: FakeModel, params: SamplingParams) -> list[tuple[float, list[int]]]:
    """Beam search over whole sequences, each computed anew by an engine of its own."""
    width, beams, found = params.beam_width, [(0.0, list[int]())], list[tuple[float, list[int]]]()
    assert params.max_tokens is not None
    for length in range(1, params.max_tokens + 1):
        steps = []
        for score, tokens in beams:
            wish = SamplingParams(max_tokens=1, num_logprobs=VOCAB, temperature=0.0)
            (sample,) = answer(Engine(model, None, tiny(prefix_cache=False)), wish, (*PROMPT, *tokens))
            steps += [(score + top.logprob, [*tokens, top.token]) for top in sample.alternatives[0]]
        steps = sorted(steps, key=lambda step: -step[0])[: 2 * width]
        beams = []
        for rank, (score, tokens) in enumerate(steps):
            if tokens[-1] != 0 and length < params.max_tokens:
                beams.append((score, tokens))
            elif rank < width:
                found.append((score / length**params.length_penalty, tokens))
        found = sorted(found, key=lambda text: -text[0])[:width]
        beams = beams[:width]
        if not beams or (len(found) == width and beams[0][0] / length**params.length_penalty <= found[-1][0]):
            break
    return found


@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (4, 0.0), (5, 1.5)])
def test_beams_are_those_of_whole_sequences(width: int, penalty: float) -> None:
    params = SamplingParams(beam_width=width, n=width, length_penalty=penalty, max_tokens=20)
    samples = answer(Engine(FakeModel(), None, tiny()), params)
    expected = beam_reference(FakeModel(), params)
    assert [sample.tokens for sample in samples] == [tokens for _, tokens in expected]
    for sample, (score, tokens) in zip(samples, expected, strict=True):
        assert sum(sample.sampling_logprobs) / len(tokens) ** penalty == pytest.approx(score, rel=1e-5)
        assert sample.finish_reason is (FinishReason.STOP if tokens[-1] == 0 else FinishReason.LENGTH)
    assert len({tuple(sample.tokens) for sample in samples}) == width


def test_beams_share_their_prefix() -> None:
    engine = Engine(FakeModel(), None, tiny())
    answer(engine, SamplingParams(beam_width=4, max_tokens=30, min_tokens=30), tuple(n % VOCAB for n in range(1, 101)))
    # The prompt once, a last page of it for each beam at most, then a row for each token of each beam.
    assert engine.counters.num_computed_tokens < 100 + 3 * 16 + 4 * 30


@pytest.mark.usefixtures("fast_draws")
@pytest.mark.parametrize("with_draft", [False, True])
def test_beams_depend_on_nothing_else(with_draft: bool, tried: Callable[[str, int], None]) -> None:
    """Many searches and samples at once, in a pool and in slots too small for them, with aborts and preemptions."""
    rng = random.Random(8)
    wishes: list[dict[str, Any]] = [{"beam_width": 3}, {"beam_width": 5, "n": 2, "length_penalty": 0.5}]
    wishes += [{"n": 2, "best_of": 4}, {"n": 2}, {"beam_width": 2, "repetition_penalty": 1.3}]
    engine = Engine(
        FakeModel(),
        None,
        tiny(num_pages=22, max_sequences=6, max_step_tokens=30),
        draft=FakeModel() if with_draft else None,
    )
    expected: dict[str, list[list[int]]] = {}
    got: dict[str, list[Sample]] = {}
    gone: set[str] = set()
    for number in range(15):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60)))
        params = SamplingParams(max_tokens=rng.randrange(2, 40), seed=number, **wishes[number % len(wishes)])
        name = f"r{number}"
        expected[name] = [sample.tokens for sample in alone(prompt, params)]
        got[name] = engine.add(Request(id=name, prompt=prompt, params=params))
    while engine.has_work:
        engine.step()
        if rng.random() < 0.05 and engine.scheduler.running:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        if rng.random() < 0.01:
            name = rng.choice(sorted(got))
            if engine.abort(name):
                gone.add(name)
        if rng.random() < 0.01:
            engine.sleep()
            engine.resume()
        assert engine.audit() == []
    assert 0 < len(gone) < 15
    for name, samples in got.items():
        if name in gone:
            assert {sample.finish_reason for sample in samples} <= {FinishReason.ABORT, None}
        else:
            assert [sample.tokens for sample in samples] == expected[name], name
            tried("engine: best-of and beam searches in a small pool against alone", 1)
    engine.flush_prefixes()
    assert engine.scheduler.pool.num_free == 22


def test_a_search_goes_on_under_new_weights() -> None:
    for mode in PauseMode:
        model = FakeModel()
        engine = Engine(model, None, tiny())
        params = SamplingParams(beam_width=3, max_tokens=30, min_tokens=30)
        (sample,) = engine.add(Request(id="a", prompt=PROMPT, params=params))
        for _ in range(8):
            engine.step()

        def update(model: FakeModel = model) -> None:
            model.version = 1

        engine.publish(1, "d", mode=mode, update=update)
        run(engine)
        assert engine.audit() == []
        if mode is PauseMode.ABORT:
            assert sample.finish_reason is FinishReason.ABORT
            continue
        assert len(sample.tokens) == 30
        versions = {weights.version for weights in sample.versions}
        assert versions == ({0} if mode is PauseMode.WAIT else {0, 1})


def test_log_probabilities_of_beams_are_the_learners() -> None:
    model = build_model(LLAMA, 7, "fp32")
    engine = Engine(model, None, EngineConfig(num_pages=60))
    samples = answer(engine, SamplingParams(beam_width=4, n=3, max_tokens=20))
    for sample, expected in zip(samples, learner(model, samples), strict=True):
        assert sample.logprobs == expected[len(PROMPT) - 1 :]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"beam_width": 1}, "beam_width"),
        ({"beam_width": 2, "n": 3}, "beam_width"),
        ({"beam_width": 2, "top_k": 4}, "top_k"),
        ({"beam_width": 2, "stop": ("a",)}, "stop"),
        ({"beam_width": 2, "temperature": 0.5}, "temperature"),
        ({"beam_width": 2, "num_logprobs": 1}, "num_logprobs"),
        ({"beam_width": 9}, "beam_width"),
        ({"n": 1, "best_of": 2000}, "n"),
    ],
)
def test_mistakes(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        Engine(FakeModel(), None, tiny()).add(
            Request(id="a", prompt=PROMPT, params=SamplingParams(max_tokens=9, **changes))
        )
    assert caught.value.field == field
