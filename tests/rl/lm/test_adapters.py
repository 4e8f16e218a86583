"""Adapters and quantised rollouts in the loop: what was sampled from is known, and corrected for where it differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from lockstep.core.errors import ConfigError, ExactnessError, WeightsError
from lockstep.engine.llm import LLM
from lockstep.interop.hf.peft import load_adapter
from lockstep.layers.low_rank import Adapter
from lockstep.learn.learner import Learner
from lockstep.learn.model import ModelConfig, build
from lockstep.models.digest import weights_digest
from lockstep.rl.lm import sampler
from lockstep.rl.lm.publish import Digests, LearnedAdapter
from lockstep.rl.lm.rollout import new_engine
from lockstep.runs.jsonl import read_jsonl
from tests.rl.lm.small import config, folder, run, untimed

LORA = {"adapter__rank": 4, "learner__optimiser__lr": 0.02}


def stale_engine(*args: object) -> object:
    """The engine got a copy of the adapter once, and never again."""
    *rest, adapter = args
    return new_engine(*rest, copy.deepcopy(adapter))  # type: ignore[arg-type]


def test_only_the_adapter_learns_exactly_and_its_reference_is_the_model_without_it(tmp_path: Path) -> None:
    wish = config("grpo", **LORA, learn__minibatches=2)
    made = folder(tmp_path, wish)
    with made:
        run(wish, made)
    lines = read_jsonl(made.metrics_path)
    assert [line["mismatch_max"] for line in lines] == [0.0] * len(lines)
    assert lines[0]["reference_kl"] == 0.0
    assert lines[-1]["reference_kl"] > 0.0
    digests = json.loads((made.path / "passport.json").read_text())["digests"]
    assert digests["first"] != digests["last"]
    # What is written: the adapter for the model that it was trained on, and both melted together.
    merged, tokenizer = LLM(made.path).engine.model, LLM(made.path).tokenizer
    assert tokenizer is not None
    adapter = load_adapter(merged, made.path / "adapter")
    assert all(float(pair.b.detach().abs().max()) > 0 for pair in adapter)


@pytest.mark.slow
def test_a_run_of_an_adapter_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    wish = config("grpo", **LORA)
    whole, parts = folder(tmp_path / "whole", wish), folder(tmp_path / "parts", wish)
    with whole:
        run(wish, whole)
    shorter = config("grpo", **LORA, run__total_steps=2)
    run(shorter, parts)
    run(wish, parts, resume=True)
    parts.finish()
    assert [untimed(x) for x in read_jsonl(parts.metrics_path)] == [untimed(x) for x in read_jsonl(whole.metrics_path)]


def test_an_adapter_that_was_never_delivered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "new_engine", stale_engine)
    with pytest.raises(WeightsError, match="version 1 did not arrive"):
        run(config(**LORA))


def test_an_adapter_whose_delivery_lies_is_found_by_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "new_engine", stale_engine)
    monkeypatch.setattr(LearnedAdapter, "deliver", LearnedAdapter.expected)
    with pytest.raises(ExactnessError, match="tokens differ"):
        run(config(**LORA))


def test_the_digest_is_of_model_and_adapter_together() -> None:
    made = build(ModelConfig(width=32, hidden=64, num_layers=1, num_heads=2, vocab_size=270), ["a"], 1, None)
    wish = config(**LORA)
    adapter = wish.adapter.build(made.model, 1)
    assert isinstance(adapter, Adapter)
    with sampler.new_sampler(made, wish.rollout, adapter) as (engine, publisher):
        first = publisher.publish(5)
        assert first.digest == weights_digest(made.model, adapter) != weights_digest(made.model)
        assert Digests("a").effective == "a"
        with torch.no_grad():
            next(iter(adapter)).b.add_(0.5)
        second = publisher.publish_next()
        assert second.digest == weights_digest(made.model, adapter) != first.digest
        assert engine.weights.version == 5


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [("int8", {}), ("int8", LORA), *(pytest.param(dtype, {}, marks=pytest.mark.slow) for dtype in ("int4", "bf16"))],
)
def test_quantised_rollouts_are_measured_and_corrected(dtype: str, changes: dict[str, object]) -> None:
    corrected = {"learn__exact": False, "learn__loss__correction__kind": "truncate"}
    _, found = run(config(rollout__dtype=dtype, learn__minibatches=2, **corrected, **changes))
    mismatch = [line["mismatch_max"] for _, line in found]
    assert 0.0 < max(mismatch) < 2.0
    assert all(0.3 < line["correction"] < 2.0 for _, line in found)
    assert any(line["correction"] != 1.0 for _, line in found)


def test_exact_or_uncorrected_training_refuses_quantised_rollouts() -> None:
    with pytest.raises(ConfigError, match=r"learn\.exact=True forbids"):
        run(config(rollout__dtype="int8"))
    with pytest.raises(ConfigError, match="'truncate' or 'mask'"):
        run(config(learn__exact=False, rollout__dtype="int8"))


def test_a_learner_of_an_adapter_keeps_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    apply = Learner.apply

    def noted(self: Learner, total: float = 0.0) -> dict[str, float]:
        result = apply(self, total)
        if self.adapter is not None:
            seen.append(weights_digest(self.model))
        return result

    monkeypatch.setattr(Learner, "apply", noted)
    run(config(**LORA))
    assert len(seen) == 4
    assert len(set(seen)) == 1
