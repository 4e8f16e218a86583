"""The loop of reinforcement: exact, repeatable, resumable, and paced by its bound of staleness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lockstep.checkpoint import Checkpointer
from lockstep.core.errors import ExactnessError
from lockstep.interop.weights import open_weights
from lockstep.learn.learner import Learner
from lockstep.models.families import load_model
from lockstep.rl.lm.algorithms import ALGORITHMS
from lockstep.rl.lm.collector import Collector
from lockstep.runs.directory import RunDirectory
from lockstep.runs.jsonl import read_jsonl
from tests.rl.lm.small import config, folder, run, stopped, untimed


def digest(directory: RunDirectory) -> str:
    return json.loads((directory.path / "passport.json").read_text())["digests"]["last"]


def lines(directory: RunDirectory) -> list[dict[str, float]]:
    return [untimed(line) for line in read_jsonl(directory.metrics_path)]


def test_samplers_logprobs_are_the_learners_and_runs_repeat() -> None:
    _, first = run(config())
    _, again = run(config())
    assert first == again
    assert [line["mismatch_max"] for _, line in first if "mismatch_max" in line] == [0.0] * len(first)
    assert len(first) == 4
    assert any(line["grad_norm"] > 0 for _, line in first)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_exact_at_other_temperatures(temperature: float) -> None:
    run(config(rollout__temperature=temperature, run__total_steps=2))


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"ppo", "distill"}))
def test_every_algorithm_runs(name: str) -> None:
    changes = {"run__total_steps": 2, "learn__minibatches": 3}
    if name == "dr_grpo":
        changes["learn__loss__max_length"] = 5
    if name == "remax":
        changes["rollout__greedy_baseline"] = True
    _, found = run(config(name, **changes))
    assert len(found) == 2


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    wish = config()
    whole = folder(tmp_path / "whole", wish)
    with whole:
        run(wish, whole)
    parts = stopped(tmp_path / "parts", wish)
    # Its model is that of the checkpoint: it can be evaluated and served before it goes on.
    _, state = Checkpointer(parts.checkpoints_path).load()
    model = load_model(open_weights(parts.path), "fp32", trainable=True)
    saved = state["parts"]["learner"]["parameters"]
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())
    assert "| steps | 2 |" in (parts.model_path / "README.md").read_text()
    left = parts.path / ".model.of-a-killed-write"
    left.mkdir()
    again = RunDirectory.open(parts.path)
    with again:
        run(wish, again, resume=True)
    assert digest(again) == digest(whole)
    assert not left.exists()
    assert lines(again) == lines(whole)
    samples = [read_jsonl(one.samples_path) for one in (again, whole)]
    assert samples[0] == samples[1]


def test_a_bound_of_zero_in_its_own_thread_is_the_synchronous_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    _, inline = run(config())
    plain = Collector.__init__
    monkeypatch.setattr(Collector, "__init__", lambda self, *args: plain(self, *args, threaded=True))
    _, threaded = run(config())
    assert threaded == inline


@pytest.mark.parametrize("staleness", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_no_token_is_older_than_the_bound_and_sampling_is_timed(tmp_path: Path, staleness: int) -> None:
    wish = config("cispo", staleness=staleness, run__total_steps=6)
    with folder(tmp_path, wish) as directory:
        run(wish, directory)
    found = read_jsonl(directory.metrics_path)
    behind = [line["behind"] for line in found]
    assert max(behind) <= staleness
    assert max(behind) > 0
    assert found[0]["rollout_s"] > 0.0
    assert found[0]["rollout_tok_s"] > 0.0


def test_weights_that_changed_unseen_are_found_before_anything_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate = Learner.accumulate

    @torch.no_grad()
    def meddle(self: Learner, *args: object, **kwargs: object) -> object:
        for parameter in self.model.parameters():
            parameter.mul_(1.001)
        with torch.enable_grad():
            return accumulate(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "accumulate", meddle)
    with pytest.raises(ExactnessError, match="tokens differ"):
        run(config(start__steps=0))
