"""The supervised and preference loops on a model of two layers: they learn, they resume bit for bit, their folders load."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lockstep.core.errors import ConfigError, FormatError, StoppedError
from lockstep.interop.weights import open_weights
from lockstep.learn import distill, preference, reward_model, sft
from lockstep.learn.adapter import AdapterConfig
from lockstep.learn.data import DataConfig, Renderer, shuffled
from lockstep.learn.heads import ScalarHead
from lockstep.learn.learner import LearnerConfig
from lockstep.learn.model import ModelConfig
from lockstep.learn.optimiser import OptimiserConfig, ScheduleConfig
from lockstep.learn.session import Result, Session, UpdatesConfig
from lockstep.models.families import load_model
from lockstep.runs.directory import RunDirectory
from lockstep.runs.sink import MemorySink
from lockstep.tokenize.tokenizer import Tokenizer
from tests.learn.conftest import write_rows

LEARNER = LearnerConfig(optimiser=OptimiserConfig(lr=3e-3, schedule=ScheduleConfig(kind="cosine", warmup_steps=2)))


def sums(num: int, seed: int) -> list[Any]:
    """Preferences and answers at once: the chosen answer says yes where the number is even."""
    rng, rows = random.Random(seed), []
    for _ in range(num):
        number = rng.randrange(10)
        right, wrong = ("yes", "no") if number % 2 == 0 else ("no", "yes")
        rows.append({"prompt": f"{number}? ", "completion": right, "chosen": right, "rejected": wrong})
    return rows


def labelled(num: int, seed: int) -> list[Any]:
    rng = random.Random(seed)
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
        for row in sums(num, seed)
        for good in [rng.random() < 0.5]
    ]


SHORT: dict[str, Any] = {"max_tokens": 2, "too_long": "skip"}


def only(rows: list[Any], *names: str) -> list[Any]:
    return [{name: row[name] for name in names} for row in rows]


def configs(folder: Path, tmp: Path) -> dict[str, tuple[Any, Callable[[Any, Session], Result]]]:
    pairs = write_rows(tmp / "pairs.jsonl", only(sums(64, 0), "prompt", "chosen", "rejected"))
    held = write_rows(tmp / "held.jsonl", only(sums(20, 1), "prompt", "chosen", "rejected"))
    answers = write_rows(tmp / "answers.jsonl", only(sums(64, 0), "prompt", "completion"))
    held_answers = write_rows(tmp / "held_answers.jsonl", only(sums(20, 1), "prompt", "completion"))
    labels = write_rows(tmp / "labels.jsonl", labelled(64, 0))
    model, run = ModelConfig(path=str(folder)), UpdatesConfig(total_steps=12, checkpoint_every=4, tensorboard=False)
    common: dict[str, Any] = {"model": model, "run": run, "learner": LEARNER, "batch": 16, "micro_tokens": 150}
    data = DataConfig(path=pairs)
    made: dict[str, tuple[Any, Callable[[Any, Session], Result]]] = {
        "sft": (sft.SFTConfig(**common, data=DataConfig(path=answers), held_out=held_answers), sft.train),
        "reward_model": (reward_model.RewardModelConfig(**common, data=data, held_out=held), reward_model.train),
        "distill": (
            distill.DistillConfig(**common, teacher=str(folder), data=DataConfig(path=answers), divergence="jsd"),
            distill.train,
        ),
        "kto": (
            preference.PreferenceConfig(**common, method="kto", data=DataConfig(path=labels), beta=0.5),
            preference.train,
        ),
    }
    for method, more in (("dpo", {}), ("ipo", {}), ("orpo", {"odds_weight": 1.0}), ("simpo", {"beta": 2.0})):
        config = preference.PreferenceConfig(method=method, **common, data=data, held_out=held, **more)  # type: ignore[arg-type]
        made[method] = config, preference.train
    return made


NAMES = ("sft", "reward_model", "distill", "dpo", "ipo", "kto", "orpo", "simpo")
# Two that share no loss stand for all in the fast suite.
FAST = ("sft", "dpo")
CASES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES]


def longer(config: Any, steps: int) -> Any:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, total_steps=steps))


@pytest.mark.parametrize("name", [name for name in CASES if name.values != ("distill",)])
def test_it_learns(name: str, model_folder: Path, tmp_path: Path) -> None:
    config, train = configs(model_folder, tmp_path)[name]
    config, sink = longer(config, 40), MemorySink()
    with Session(config.run, sink=sink) as session:
        result = train(config, session)
    losses = sink.series("loss")[1]
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.02
    if name == "kto":
        good, bad = (sink.series(key)[1][-1] for key in ("reward_good", "reward_bad"))
        assert good > bad + 0.1
    else:
        assert result.first is not None
        assert result.last is not None
        assert result.last.mean > result.first.mean + 0.3
    if name not in ("sft", "kto"):
        assert result.last is not None
        assert result.last.mean > 0.9


def train_until(train: Any, config: Any, session: Session, stop_at: int | None) -> None:
    """To the end, or stopped from outside at a step."""
    if stop_at is None:
        train(config, session)
        return
    session.on_progress = stopper(session, stop_at)
    with pytest.raises(StoppedError):
        train(config, session)


@pytest.mark.parametrize(
    "name", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "kto", "reward_model", "distill"))]
)
def test_an_adapter_learns_in_the_models_stead_and_goes_on_after_a_stop(
    name: str, model_folder: Path, tmp_path: Path
) -> None:
    config, train = configs(model_folder, tmp_path)[name]
    config = dataclasses.replace(longer(config, 4), adapter=AdapterConfig(rank=4))
    if name == "distill":  # of the model itself, which has nothing to teach it
        config = dataclasses.replace(config, likelihood_weight=1.0)
    folders = []
    for stop_at in (None, 2):
        directory = RunDirectory.create(tmp_path / "runs", name, config, 1)
        with directory, Session(config.run, directory=directory) as session:
            train_until(train, config, session, stop_at)
        if stop_at is not None:
            with (
                RunDirectory.open(directory.path) as again,
                Session(config.run, directory=again, resume=True) as session,
            ):
                train(config, session)
        folders.append(directory.path)
    files = [{file.name: load_file(file) for file in (path / "model").glob("*.safetensors")} for path in folders]
    (whole,), (parts,), base = files[0].values(), files[1].values(), load_file(model_folder / "model.safetensors")
    assert all(whole[name].equal(parts[name]) for name in whole)
    changed = {name.rsplit(".", 2)[-2] for name in whole if name in base and not whole[name].equal(base[name])}
    assert "q_proj" in changed
    assert not changed & {"embed_tokens", "norm", "input_layernorm", "lm_head"}


@pytest.mark.slow
def test_a_student_takes_the_teachers_distribution(model_folder: Path, tmp_path: Path) -> None:
    config, train = configs(model_folder, tmp_path)["distill"]
    # The pupil is the teacher after other lessons: it starts elsewhere and comes back.
    taught, sink = tmp_path / "runs", MemorySink()
    lesson, teach = configs(model_folder, tmp_path)["sft"]
    with (
        RunDirectory.create(taught, "pupil", lesson, 1) as directory,
        Session(lesson.run, directory=directory) as session,
    ):
        pupil = teach(lesson, session).model_path
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        sink = MemorySink()
        now = dataclasses.replace(longer(config, 15), divergence=kind, model=ModelConfig(path=str(pupil)))
        with Session(now.run, sink=sink) as session:
            train(now, session)
        divergence = sink.series("divergence")[1]
        assert divergence[-1] < 0.5 * divergence[0], kind


def stopper(session: Session, at: int) -> Callable[..., None]:
    """As a signal would at that step."""

    def on_progress(step: int, total: int, line: object) -> None:
        session.stop_requested = step >= at

    return on_progress


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name: str, model_folder: Path, tmp_path: Path) -> None:
    config, train = configs(model_folder, tmp_path)[name]
    lines = []
    for stop_at in (None, 6):
        directory = RunDirectory.create(tmp_path / "runs", name, config, 1)
        path = directory.path
        with directory, Session(config.run, directory=directory) as session:
            train_until(train, config, session, stop_at)
        if stop_at is not None:
            directory = RunDirectory.open(path)
            with directory, Session(config.run, directory=directory, resume=True) as session:
                train(config, session)
        text = (path / "metrics.jsonl").read_text()
        lines.append(
            [
                {k: v for k, v in json.loads(line).items() if k not in ("wall_s", "train_s")}
                for line in text.splitlines()
            ]
        )
        if stop_at is None:
            whole = {file.name: file.read_bytes() for file in (path / "model").glob("*.safetensors")}
        else:
            assert {file.name: file.read_bytes() for file in (path / "model").glob("*.safetensors")} == whole
    assert lines[0] == lines[1]
    assert len(lines[0]) == 12


@pytest.mark.slow
def test_the_folder_of_a_reward_model_scores_the_same_in_transformers(model_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config, train = configs(model_folder, tmp_path)["reward_model"]
    with (
        RunDirectory.create(tmp_path / "runs", "rm", config, 1) as directory,
        Session(config.run, directory=directory) as session,
    ):
        path = train(config, session).model_path
    assert path is not None
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    renderer = Renderer(Tokenizer.from_folder(path), DataConfig())
    pair = renderer.pair({"prompt": "4? ", "chosen": "yes", "rejected": "no, no"}, "x:1")
    assert pair is not None
    trunk = load_model(open_weights(model_folder), trainable=True)
    with torch.no_grad():
        expected = [float(theirs(one.tokens[None]).logits) for one in pair]
    head = ScalarHead(trunk.facts.width)
    _restore(directory.path, trunk, head)
    assert reward_model.score(trunk, head, list(pair), 500) == pytest.approx(expected, abs=1e-5)
    assert expected[0] != expected[1]


def _restore(path: Path, trunk: Any, head: ScalarHead) -> None:
    from lockstep.checkpoint.store import Checkpointer
    from lockstep.learn.learner import Learner

    trunk.head.requires_grad_(False)
    learner = Learner(trunk, LEARNER, heads={"reward": head}, total_steps=12)
    learner.load_state_dict(Checkpointer(path / "checkpoints").load()[1]["parts"]["learner"])


def test_sft_of_a_new_model_makes_its_own_tokenizer(tmp_path: Path) -> None:
    answers = write_rows(tmp_path / "answers.jsonl", only(sums(64, 0), "prompt", "completion"))
    model = ModelConfig(width=32, num_layers=1, num_heads=2, hidden=32, vocab_size=280, max_context=64)
    run = UpdatesConfig(total_steps=3, tensorboard=False)
    config = sft.SFTConfig(model=model, data=DataConfig(path=answers), run=run, learner=LEARNER)
    with (
        RunDirectory.create(tmp_path / "runs", "new", config, 1) as directory,
        Session(run, directory=directory) as session,
    ):
        path = sft.train(config, session).model_path
    assert path is not None
    load_model(open_weights(path))
    assert Tokenizer.from_folder(path).eos_ids


def test_wishes_that_cannot_be_met(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path"):
        preference.train(preference.PreferenceConfig(), Session(UpdatesConfig()))
    with pytest.raises(ConfigError, match="teacher"):
        distill.train(distill.DistillConfig(), Session(UpdatesConfig()))
    with pytest.raises(ConfigError, match="held_out empty"):
        preference.PreferenceConfig(method="kto", held_out="x")
    with pytest.raises(ConfigError, match="dpo, ipo"):
        preference.PreferenceConfig(method="ppo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"adapter\.rank=4 of a new model"):
        sft.train(sft.SFTConfig(adapter=AdapterConfig(rank=4)), Session(UpdatesConfig()))
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b"}])
    config = preference.PreferenceConfig(model=ModelConfig(path=str(model_folder)), data=DataConfig(path=bad))
    with pytest.raises(FormatError, match=r'bad\.jsonl:1: "rejected" is missing'):
        preference.train(config, Session(config.run))


@pytest.mark.parametrize(
    ("last", "changes", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, {}, r'bad\.jsonl:9: "rejected" is missing'),
        (
            {"prompt": "a " * 900, "chosen": "b", "rejected": "c"},
            {},
            r"bad\.jsonl:9: has \d+ tokens, the model's positions",
        ),
        (
            {"prompt": "a " * 9, "chosen": "b", "rejected": "c"},
            {"micro_tokens": 30},
            r"in both answers.*micro_tokens=30",
        ),
        (None, {}, "every row of .* is skipped"),
    ],
)
@pytest.mark.parametrize("loop", [preference, reward_model])
def test_a_row_that_comes_late_is_refused_before_the_first_step(
    loop: Any, last: Any, changes: dict[str, Any], says: str, model_folder: Path, tmp_path: Path
) -> None:
    rows = [*only(sums(8, 0), "prompt", "chosen", "rejected"), *([last] if last else [])]
    data = DataConfig(path=write_rows(tmp_path / "bad.jsonl", rows), **({} if last else SHORT))
    kind = preference.PreferenceConfig if loop is preference else reward_model.RewardModelConfig
    config = kind(model=ModelConfig(path=str(model_folder)), data=data, batch=2, **changes)
    session = Session(config.run, sink=MemorySink())
    with pytest.raises((ConfigError, FormatError), match=says):
        loop.train(config, session)
    assert session.step == 0


def test_rows_that_the_run_does_not_take_are_not_read(model_folder: Path, tmp_path: Path) -> None:
    """And rows of KTO that are too long together still make a batch."""
    rows = [
        {"prompt": "a " * 3 * (i % 2), "completion": "b " * 3 * (1 - i % 2), "label": bool(i % 3)} for i in range(8)
    ]
    rows = [{**row, "prompt": row["prompt"] or "a", "completion": row["completion"] or "b"} for row in rows]
    taken = set(shuffled(9, 4, 1, 0))
    rows.insert(next(place for place in range(9) if place not in taken), {"prompt": "neither"})
    config = preference.PreferenceConfig(
        method="kto",
        model=ModelConfig(path=str(model_folder)),
        data=DataConfig(path=write_rows(tmp_path / "rows.jsonl", rows), max_tokens=9),
        batch=4,
        run=UpdatesConfig(total_steps=1),
    )
    assert preference.train(config, Session(config.run, sink=MemorySink())).steps == 1
