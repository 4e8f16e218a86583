"""A run directory explains itself, has one writer and tells the truth after a kill."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from lockstep.core.env import child_environment
from lockstep.core.errors import CheckpointError, ConfigError
from lockstep.runs.config_json import config_from_json, config_to_json
from lockstep.runs.directory import RunDirectory, RunState, read_status
from lockstep.runs.jsonl import read_jsonl
from lockstep.runs.record import DamagedRun, RunRecord, find_run, list_run_folders, read_run


@dataclasses.dataclass(frozen=True)
class Adam:
    lr: float = 3e-4


@dataclasses.dataclass(frozen=True)
class Sgd:
    lr: float = 0.1
    momentum: float = 0.9


@dataclasses.dataclass(frozen=True)
class Env:
    id: str = "CartPole-v1"
    kwargs: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Config:
    env: Env = Env()
    optimiser: Adam | Sgd = Adam()
    hidden: tuple[int, ...] = (64, 64)
    pair: tuple[int, str] = (1, "a")
    clip: float | None = None
    mode: Literal["a", "b"] = "a"
    stop_at: float = float("inf")
    out: Path = Path("x/y")


def create(root: Path, **fields: Any) -> RunDirectory:
    return RunDirectory.create(root, "ppo-cartpole", Config(**fields), 3, kernels="naive")


def test_layout_and_contents(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        sink = run.sink()
        sink.log(10, {"return": 1.0})
        sink.close()
        run.log_eval(10, [1.0, 3.0], lengths=[5.0, 6.0])
    names = {path.name for path in run.path.iterdir()}
    expected = {"config.json", "versions.json", "run.json", "metrics.jsonl", "eval.jsonl", "tensorboard", "run.lock"}
    assert names == expected
    assert run.path.name.startswith("ppo-cartpole-s3-2")
    document = json.loads((run.path / "config.json").read_text())
    assert document["recipe"] == "ppo-cartpole"
    assert document["seed"] == 3
    record = read_run(run.path)
    assert (record.env_id, record.num_steps, record.state) == ("CartPole-v1", 10, RunState.FINISHED)
    assert {"lockstep", "torch", "numpy", "gymnasium", "python", "commit", "dirty", "platform", "cpu"} <= set(
        record.versions()
    )
    assert record.versions()["kernels"] == "naive"
    assert read_jsonl(run.eval_path) == [{"step": 10, "mean": 2.0, "returns": [1.0, 3.0], "lengths": [5.0, 6.0]}]
    assert record.last_evaluation() == record.evaluations()[-1]
    assert record.evaluations()[0].mean == 2.0
    assert record.status.stopped is not None
    assert 0 <= record.status.wall_seconds < 60  # milliseconds: a run this short may round to none


def test_runs_of_one_second_get_names_of_their_own(tmp_path: Path) -> None:
    runs = [create(tmp_path) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    for run in runs:
        run.finish()


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b"])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="run name"):
        RunDirectory.create(tmp_path, name, Config(), 0)


def test_status_after_an_exception_and_an_interrupt(tmp_path: Path) -> None:
    failed, killed = create(tmp_path), create(tmp_path)
    with pytest.raises(ZeroDivisionError), failed:
        1 / 0  # noqa: B018
    with pytest.raises(KeyboardInterrupt), killed:
        raise KeyboardInterrupt
    assert read_run(failed.path).state is RunState.FAILED
    assert "ZeroDivisionError: division by zero" in read_status(failed.path).error
    assert read_run(killed.path).state is RunState.KILLED


def test_a_second_writer_is_refused_in_one_process(tmp_path: Path) -> None:
    run = create(tmp_path)
    assert read_run(run.path).state is RunState.RUNNING
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
        RunDirectory.open(run.path)
    assert read_run(run.path).state is RunState.RUNNING
    run.finish()
    again = RunDirectory.open(run.path)
    assert read_status(run.path).num_resumes == 1
    again.finish()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = create(tmp_path)
    context = multiprocessing.get_context("fork")
    gate = context.Event()
    worker = context.Process(target=gate.wait, args=(20,))
    worker.start()
    try:
        run.finish()
        RunDirectory.open(run.path).finish()
    finally:
        gate.set()
        worker.join()


WRITER = """
import dataclasses, sys, time
from pathlib import Path
from lockstep.runs import RunDirectory

@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 0.1

run = RunDirectory.create(Path(sys.argv[1]), "live", Config(), 0)
sink = run.sink()
sink.log(7, {"return": 1.0})
print(run.path, flush=True)
time.sleep(60)
"""


def test_another_process_and_its_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment())
    assert writer.stdout is not None
    try:
        path = Path(writer.stdout.readline().strip())
        assert read_run(path).state is RunState.RUNNING
        with pytest.raises(CheckpointError, match=f"in use by process {writer.pid}"):
            RunDirectory.open(path)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    record = read_run(path)
    assert record.state is RunState.KILLED
    assert record.num_steps == 7
    with RunDirectory.open(path):
        assert read_run(path).state is RunState.RUNNING
    assert read_run(path).state is RunState.FINISHED


def test_rewind_forgets_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        sink = run.sink()
        for step in (10, 20, 30):
            sink.log(step, {"return": float(step)})
            run.log_eval(step, [float(step)])
        sink.close()
    with RunDirectory.open(run.path) as run:
        run.rewind(20)
        sink = run.sink()
        sink.log(30, {"return": 31.0})
        sink.close()
    record = read_run(run.path)
    assert record.series("return") == ([10, 20, 30], [10.0, 20.0, 31.0])
    assert [e.step for e in record.evaluations()] == [10, 20]
    with RunDirectory.open(run.path) as run:
        run.rewind(20, evaluated=10)
    assert [e.step for e in read_run(run.path).evaluations()] == [10]


def test_wall_seconds_add_up_over_resumes(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        time.sleep(0.05)
    first = read_status(run.path).wall_seconds
    assert first >= 0.05
    with RunDirectory.open(run.path):
        time.sleep(0.05)
    assert read_status(run.path).wall_seconds >= first + 0.049  # written in whole milliseconds


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run directory"):
        RunDirectory.open(tmp_path)
    run = create(tmp_path)
    run.finish()
    (run.path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        RunDirectory.open(run.path)


def test_listing_shows_damaged_folders(tmp_path: Path) -> None:
    good = create(tmp_path)
    good.finish()
    for name, content in (("no-config", None), ("bad-config", "{"), ("list-config", "[]")):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "config.json").write_text(content)
    bad_metrics = create(tmp_path)
    bad_metrics.finish()
    (bad_metrics.path / "metrics.jsonl").write_text("garbage\n")
    bad_eval = create(tmp_path)
    bad_eval.finish()
    (bad_eval.path / "eval.jsonl").write_text('{"step": 1}\n')
    found = list_run_folders(tmp_path)
    assert sum(isinstance(run, RunRecord) for run in found) == 1
    reasons = {run.path.name: run.reason for run in found if isinstance(run, DamagedRun)}
    assert set(reasons) == {"no-config", "bad-config", "list-config", bad_metrics.path.name, bad_eval.path.name}
    assert all("damaged" in reason for reason in reasons.values())


def test_finding_a_run(tmp_path: Path) -> None:
    run, other = create(tmp_path), RunDirectory.create(tmp_path, "dqn", Config(), 0)
    run.finish()
    other.finish()
    assert find_run(tmp_path, str(run.path)) == run.path
    assert find_run(tmp_path, run.path.name) == run.path
    assert find_run(tmp_path, "dqn") == other.path
    with pytest.raises(CheckpointError, match="unknown run 'dqm'"):
        find_run(tmp_path, "dqm")
    with pytest.raises(CheckpointError, match="several"):
        find_run(tmp_path, "")


def test_config_round_trip() -> None:
    config = Config(
        env=Env("Pong", {"flag": True, "count": 3, "rate": 0.5, "word": "inf"}),
        optimiser=Sgd(0.5),
        hidden=(1, 2, 3),
        clip=0.2,
        mode="b",
    )
    data = json.loads(json.dumps(config_to_json(config), allow_nan=False))
    loaded = config_from_json(Config, data)
    assert loaded == config
    assert type(loaded.env.kwargs["flag"]) is bool
    assert type(loaded.env.kwargs["count"]) is int
    assert isinstance(loaded.out, Path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hiden": []}, "did you mean 'hidden'"),
        ({"mode": "c"}, "Config.mode"),
        ({"hidden": [1, "x"]}, r"Config.hidden\[1\]"),
        ({"pair": [1]}, "has 1 elements; expected 2"),
        ({"clip": "big"}, "Config.clip"),
        ({"optimiser": {"class": "Lion"}}, "Config.optimiser is a Lion"),
        ({"env": 3}, "Config.env"),
        ({"class": "Other"}, "is a Other; expected Config"),
    ],
)
def test_config_errors_name_the_place(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config_from_json(Config, {**config_to_json(Config()), **change})


def test_config_that_cannot_be_written_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Config\.hidden\[0\] is a object"):
        config_to_json(Config(hidden=(object(),)))  # type: ignore[arg-type]
