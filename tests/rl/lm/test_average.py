"""An average of weights is evaluated beside them, written, chosen by name, and resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.cli import evaluate_language
from lockstep.cli.model_words import of_run
from lockstep.cli.train import columns
from lockstep.core.errors import CheckpointError, ConfigError
from lockstep.engine.llm import load
from lockstep.learn.learner import Learner, LearnerConfig
from lockstep.learn.optimiser import OptimiserConfig
from lockstep.learn.packing import micro_batches
from lockstep.learn.session import Session
from lockstep.models.adapter import LoraConfig, new_adapter
from lockstep.rl.lm import grpo
from lockstep.runs.directory import RunDirectory
from lockstep.runs.jsonl import read_jsonl
from tests.learn.test_learner import mean_loss
from tests.learn.tiny import examples, tiny
from tests.rl.lm.small import config, folder, run, stopped

EMA = {"learner__ema_decay": 0.5, "learner__optimiser__lr": 0.02, "run__eval_every": 2}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(load(path, "fp32")[0].state_dict())


@pytest.mark.parametrize("adapted", [False, True], ids=["model", "adapter"])
def test_copies_hold_the_average_and_the_trained_weights_stay(adapted: bool) -> None:
    model = tiny()
    adapter = new_adapter(model, LoraConfig(rank=4)) if adapted else None
    learner = Learner(model, LearnerConfig(optimiser=OptimiserConfig(lr=1e-2), ema_decay=0.5), adapter=adapter)
    micros = micro_batches(examples(4, seed=1), 100)
    names = list(learner.named_parameters())
    average = [p.detach().clone() for p in learner.named_parameters().values()]
    for _ in range(3):
        learner.step(micros, mean_loss(30))
        average = [
            a + 0.5 * (p.detach() - a) for a, p in zip(average, learner.named_parameters().values(), strict=True)
        ]
    now = {name: p.detach().clone() for name, p in learner.named_parameters().items()}
    sets = learner.weights()
    other = sets["averaged"]
    assert sets["trained"].model is model
    found = {f"adapter:{n}": p for n, p in other.adapter.named_parameters()} if other.adapter else None
    found = found or dict(other.model.named_parameters())
    assert (other.model is model) == adapted  # the model beside an adapter is frozen, and its own average
    for name, expected in zip(names, average, strict=True):
        torch.testing.assert_close(found[name].detach(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(learner.named_parameters()[name], now[name])
        assert not torch.equal(found[name], now[name])


@pytest.mark.parametrize("serve", ["trained", "averaged"])
def test_both_are_evaluated_written_and_chosen(serve: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wish = config(**EMA, learner__serve=serve)
    other = "averaged" if serve == "trained" else "trained"
    made, told = folder(tmp_path, wish), []
    session = Session(wish.run, directory=made, on_progress=lambda step, _, line: told.append(dict(line)))
    with made, session:
        result = grpo.train(wish, session)
    assert result.last is not None
    lines = read_jsonl(made.eval_path)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0][other] == lines[0]["mean"]
    assert [line[other] for line in lines] == [line[other] for line in told if "eval" in line]
    assert other in columns(wish)["answers"]
    assert {path.name for path in made.path.glob("model*")} == {"model", f"model-{other}"}
    assert of_run(str(made.path), other) == str(made.path / f"model-{other}")
    assert of_run(str(made.path), serve) == str(made.path / "model")
    assert of_run(str(made.path), "") == str(made.path)
    first, second = tensors(made.path / "model"), tensors(made.path / f"model-{other}")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    # What was written of either is what was evaluated: the same answers of the same weights.
    for which, expected in ((serve, result.last.mean), (other, lines[-1][other])):
        evaluate_language.main([str(made.path), "--weights", which, "--problems", "6", "--samples", "0"])
        assert f"{expected:.3f} (95% interval" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_average(tmp_path: Path) -> None:
    wish = config("grpo", **EMA, learner__serve="averaged", adapter__rank=4)
    whole = folder(tmp_path / "whole", wish)
    with whole:
        run(wish, whole)
    parts = stopped(tmp_path / "parts", wish)
    again = RunDirectory.open(parts.path)
    with again:
        run(wish, again, resume=True)
    for name in ("model", "model-trained"):
        one, two = (next((path / name).glob("*.safetensors")).read_bytes() for path in (whole.path, again.path))
        assert one == two
    assert {path.name for path in again.path.glob("adapter*")} == {"adapter", "adapter-trained"}


def test_wishes_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keeps no average"):
        LearnerConfig(serve="averaged")
    with pytest.raises(ConfigError, match="0 < ema_decay < 1"):
        LearnerConfig(ema_decay=1.0)
    with pytest.raises(ConfigError, match="trained, averaged"):
        LearnerConfig(serve="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ema_decay above 0 keeps both"):
        of_run(str(tmp_path), "averaged")
    with pytest.raises(ConfigError, match="trained, averaged"):
        of_run(str(tmp_path), "mean")
    state: dict[str, Any] = Learner(tiny(), LearnerConfig()).state_dict()
    with pytest.raises(CheckpointError, match="holds no average"):
        Learner(tiny(), LearnerConfig(ema_decay=0.9)).load_state_dict(state)
