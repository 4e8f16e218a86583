"""A draft model changes the number of steps and nothing else, whatever happens to pages, requests and weights meanwhile."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lockstep.core.errors import ConfigError
from lockstep.core.request import Request, Sample
from lockstep.core.sampling import SamplingParams
from lockstep.engine import engine as engine_module
from lockstep.engine.config import EngineConfig, resolve
from lockstep.engine.engine import Engine, Gate, PauseMode
from lockstep.engine.queue import Sequence
from lockstep.engine.speculation import learn
from lockstep.models.families import build_model
from tests.engine.fake import VOCAB, FakeModel, run, tiny
from tests.engine.test_exact import LLAMA, learner, requests


class Weak(FakeModel):
    """Agrees with the model served for some tokens only."""

    def logits(self, hidden_RE: Tensor) -> Tensor:
        logits_RV = super().logits(hidden_RE)
        spoilt_R = (hidden_RE[:, 0] % 3 == 0)[:, None]
        return torch.where(spoilt_R, logits_RV.roll(1, dims=1), logits_RV)


def samples_of(engine: Engine, wanted: list[Request]) -> list[Sample]:
    samples = [sample for request in wanted for sample in engine.add(request)]
    run(engine)
    assert engine.audit() == []
    return samples


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_text_is_the_one_without_a_draft(temperature: float) -> None:
    params = SamplingParams(max_tokens=60, seed=4, n=3, temperature=temperature, ignore_eos=True)
    wanted = [Request(id=f"{n}", prompt=tuple(range(n, n + 20)), params=params) for n in range(3)]
    plain = Engine(FakeModel(), None, tiny())
    texts = [sample.tokens for sample in samples_of(plain, wanted)]
    steps = {"none": plain.counters.num_steps}
    for name, draft in (("weak", Weak()), ("same", FakeModel())):
        engine = Engine(FakeModel(), None, tiny(max_draft_tokens=4), draft=draft)
        samples = samples_of(engine, wanted)
        assert [sample.tokens for sample in samples] == texts
        counters = engine.counters
        steps[name] = counters.num_steps
        rate = counters.num_accepted_tokens / counters.num_draft_tokens
        # The noise is shared: equal models agree at every temperature.
        assert 0.3 < rate < 0.9 if name == "weak" else rate == 1.0
    assert steps["same"] < steps["weak"] < steps["none"]


@pytest.mark.slow
@pytest.mark.usefixtures("fast_draws")
def test_the_drafts_pages_survive_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is the model served is always right, so a guess that is wrong shows a lost or stale key."""
    missed: list[str] = []
    mixed: set[str] = set()

    def check(sequence: Sequence, num_guessed: int, num_right: int) -> None:
        if num_right < num_guessed and not sequence.sample.is_finished and sequence.request.id not in mixed:
            missed.append(sequence.request.id)
        learn(sequence, num_guessed, num_right)

    monkeypatch.setattr(engine_module, "learn", check)
    rng, model, draft = random.Random(6), FakeModel(), FakeModel()
    engine = Engine(model, None, tiny(num_pages=24, max_step_tokens=40, max_draft_tokens=5), draft=draft)
    prefixes = [tuple(rng.randrange(VOCAB) for _ in range(60)) for _ in range(3)]
    live: set[str] = set()
    while engine.counters.num_steps < 900:
        if rng.random() < 0.2 and engine.num_unfinished < 30:
            prompt = (*rng.choice(prefixes)[: rng.choice((16, 32, 60))], *range(rng.randrange(1, 20)))
            params = SamplingParams(
                max_tokens=rng.randrange(1, 90), seed=rng.randrange(9), n=rng.choice((1, 1, 3)), temperature=0.7
            )
            name = f"r{engine.counters.num_steps}-{len(live)}"
            engine.add(Request(id=name, prompt=prompt, params=params))
            live.add(name)
        chance = rng.random()
        if chance < 0.01 and live:
            engine.abort(rng.choice(sorted(live)))
        elif chance < 0.015 and engine.gate is Gate.OPEN:
            engine.sleep()
            engine.resume()
        elif chance < 0.02 and engine.gate is Gate.OPEN:
            version, mode = engine.weights.version + 1, rng.choice(list(PauseMode))
            if mode is PauseMode.KEEP:
                mixed |= {sequence.request.id for sequence in engine.scheduler.running}

            def update(version: int = version) -> None:
                model.version = draft.version = version

            engine.publish(version, "d", mode=mode, update=update)
        for output in engine.step():
            if output.is_finished and output.sample.index == 0:
                live.discard(output.sample.request_id)
        if rng.random() < 0.05:
            assert engine.audit() == []
    run(engine)
    assert missed == []
    assert engine.audit() == []
    counters = engine.counters
    assert counters.num_preemptions > 10
    assert counters.num_accepted_tokens > 1500
    assert engine.scheduler.tree.num_evicted > 30


@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
def test_log_probabilities_stay_the_learners(kv_dtype: str) -> None:
    model, rng = build_model(LLAMA, 7, "fp32"), random.Random(1)
    draft = build_model({**LLAMA, "num_hidden_layers": 1}, 7, "fp32", trainable=False)
    wanted, texts = requests(rng, 5), []
    for other in (None, draft):
        config = EngineConfig(num_pages=14, max_sequences=4, max_step_tokens=30, kv_dtype=kv_dtype)
        engine = Engine(model, None, config, draft=other)
        samples = samples_of(engine, wanted)
        texts.append([(sample.tokens, sample.logprobs) for sample in samples])
        if kv_dtype == "auto":
            for sample, expected in zip(samples, learner(model, samples), strict=True):
                assert sample.logprobs == expected[len(sample.prompt) - 1 :]
        assert (engine.counters.num_accepted_tokens > 0) == (other is not None)
    assert texts[0] == texts[1]


def test_a_draft_that_cannot_go_on_harms_nobody() -> None:
    class Broken(FakeModel):
        def logits(self, hidden_RE: Tensor) -> Tensor:
            return super().logits(hidden_RE) * torch.nan

    wanted = [Request(id="a", prompt=(1, 2, 3), params=SamplingParams(max_tokens=40, seed=1))]
    (expected,) = samples_of(Engine(FakeModel(), None, tiny()), wanted)
    engine = Engine(FakeModel(), None, tiny(), draft=Broken())
    (sample,) = samples_of(engine, wanted)
    assert sample.tokens == expected.tokens
    assert engine.counters.num_accepted_tokens == 0


def test_plan_and_mistakes() -> None:
    assert resolve(EngineConfig(), FakeModel(), 64 * 1024, (), FakeModel()).num_pages == 32
    assert resolve(EngineConfig(), FakeModel(), 64 * 1024, (), FakeModel()).max_draft_tokens == 5
    other = FakeModel()
    other.vocab_size = VOCAB + 1
    with pytest.raises(ConfigError, match=f"{VOCAB + 1} tokens and the served model {VOCAB}"):
        Engine(FakeModel(), None, tiny(), draft=other)
    with pytest.raises(ConfigError, match="max_context=100 or less"):
        Engine(FakeModel(), None, tiny(), draft=FakeModel(max_context=100))
    with pytest.raises(ConfigError, match="would guess nothing"):
        Engine(FakeModel(), None, tiny(max_draft_tokens=0), draft=FakeModel())
