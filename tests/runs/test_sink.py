"""Every sink keeps one contract; files survive kills and resumes."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lockstep.core.env import child_environment
from lockstep.core.errors import CheckpointError, ConfigError, MissingExtraError
from lockstep.runs.jsonl import last_record, read_jsonl, truncate_after
from lockstep.runs.sink import JsonlSink, MemorySink, MetricSink, TeeSink, TensorBoardSink, WandbSink

METRICS = {"loss/value": 0.25, "return": math.nan, "big": 1e300}


class FakeWandb(ModuleType):
    """Takes what the client would send."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.Error = RuntimeError
        self.sent: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **_: Any) -> Any:
        return SimpleNamespace(log=lambda metrics, step: self.sent.append((step, metrics)), finish=self.finish)

    def finish(self) -> None:
        self.finished += 1


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def make_jsonl(tmp_path: Path) -> tuple[MetricSink, Callable[[], Any]]:
    path = tmp_path / "metrics.jsonl"
    return JsonlSink(path), lambda: [(r["step"], {k: r[k] for k in METRICS}) for r in read_jsonl(path)]


def make_tensorboard(tmp_path: Path) -> tuple[MetricSink, Callable[[], Any]]:
    def read() -> Any:
        scalars = tensorboard_scalars(tmp_path)
        steps = [step for step, _ in scalars["return"]]
        return [(step, {name: scalars[name][i][1] for name in METRICS}) for i, step in enumerate(steps)]

    return TensorBoardSink(tmp_path), read


def make_memory(tmp_path: Path) -> tuple[MetricSink, Callable[[], Any]]:
    sink = MemorySink()
    return sink, lambda: sink.records


def make_tee(tmp_path: Path) -> tuple[MetricSink, Callable[[], Any]]:
    first, second = MemorySink(), MemorySink()

    def read() -> Any:
        assert repr(first.records) == repr(second.records)
        return second.records

    return TeeSink([first, second]), read


@pytest.mark.parametrize("make", [make_jsonl, make_tensorboard, make_memory, make_tee])
def test_sink_contract(tmp_path: Path, make: Callable[[Path], tuple[MetricSink, Callable[[], Any]]]) -> None:
    sink, read = make(tmp_path)
    sink.log(0, METRICS)
    sink.log(2**40, {**METRICS, "loss/value": torch.tensor(0.5)})  # type: ignore[dict-item]
    sink.flush()
    (first, a), (second, b) = read()  # before close: a kill after flush loses nothing
    assert (first, second) == (0, 2**40)
    assert (a["loss/value"], b["loss/value"]) == (0.25, 0.5)
    assert a["return"] is None or math.isnan(a["return"])
    sink.close()
    sink.flush()
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.log(3, METRICS)


def test_wandb_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WandbSink("project", "run", {}, tmp_path)
    sink.log(3, {"loss": torch.tensor(0.5)})  # type: ignore[dict-item]
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.log(4, {})
    assert fake.sent == [(3, {"loss": 0.5})]
    assert fake.finished == 1


@pytest.mark.slow
def test_wandb_client_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WandbSink("project", "run", {"lr": 0.1}, tmp_path)
    sink.log(3, {"loss": 0.5})
    sink.close()
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while b"loss" not in record.read_bytes():  # the client's own process writes the file, after `finish` has returned
        assert time.monotonic() < deadline, record.read_bytes()
        time.sleep(0.1)


def test_wandb_that_cannot_begin_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()

    def init(**_: Any) -> Any:
        raise fake.Error("no API key")

    monkeypatch.setattr(fake, "init", init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ConfigError, match=r"no API key; run `wandb login`"):
        WandbSink("project", "run", {}, tmp_path)


def test_wandb_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"lockstep-rl\[wandb\]"):
        WandbSink("project", "run", {}, tmp_path)


def test_jsonl_is_strict_json_and_keeps_the_key(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})
    sink.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    record = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert record == {"step": 1, "wall_s": record["wall_s"], "a": None, "b": None, "c": None, "d": 0.1}


def test_jsonl_refuses_its_own_names(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    with pytest.raises(ConfigError, match="wall_s"):
        sink.log(1, {"wall_s": 1.0})
    sink.close()


def test_resumed_curve_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def log(sink: MetricSink, steps: range) -> None:
        for step in steps:
            sink.log(step, {"loss": 1 / 3 / (step + 1), "nan": math.nan})
        sink.close()

    def curve(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k != "wall_s"} for record in read_jsonl(path)]

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    log(JsonlSink(whole), range(0, 100, 5))
    log(JsonlSink(killed), range(0, 70, 5))
    with killed.open("a") as file:
        file.write('{"step": 70, "lo')  # SIGKILL in the middle of a line
    assert len(read_jsonl(killed)) == 14
    log(JsonlSink(killed, resume_step=40), range(45, 100, 5))
    assert curve(killed) == curve(whole)


def test_wall_time_goes_on_after_a_resume(tmp_path: Path) -> None:
    now = [100.0]
    sink = JsonlSink(tmp_path / "m.jsonl", clock=lambda: now[0])
    now[0] = 107.0
    sink.log(1, {})
    sink.close()
    now[0] = 500.0
    sink = JsonlSink(tmp_path / "m.jsonl", clock=lambda: now[0])
    now[0] = 501.5
    sink.log(2, {})
    sink.close()
    assert [record["wall_s"] for record in read_jsonl(tmp_path / "m.jsonl")] == [7.0, 8.5]


def test_an_append_after_a_kill_starts_on_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "wall_s": 0}\n{"step": 2, "wa')
    sink = JsonlSink(path)
    sink.log(3, {})
    sink.close()
    assert [record["step"] for record in read_jsonl(path)] == [1, 3]


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n\0\0\0\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_jsonl(path)
    with pytest.raises(CheckpointError, match="line 2"):
        truncate_after(path, 1)
    assert path.read_text().count("\n") == 3


def test_last_record_of_long_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert last_record(path) is None
    path.write_text("")
    assert last_record(path) is None
    path.write_text('{"step": 1}\n' + json.dumps({"step": 2, "returns": list(range(20_000))}) + "\n" + '{"step": 3, "x')
    last = last_record(path)
    assert last is not None
    assert last["step"] == 2


def test_tensorboard_purges_what_a_resume_repeats(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    for step in range(10):
        first.log(step, {"loss": step})
    first.close()
    second = TensorBoardSink(tmp_path, resume_step=4)
    second.log(5, {"loss": 50})
    second.close()
    assert tensorboard_scalars(tmp_path)["loss"] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]


def test_tensorboard_values_are_float32_bits(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.log(1, {"third": 1 / 3, "inf": math.inf, "huge": -1e300, "ünicode/na me": 1.0})
    sink.close()
    scalars = tensorboard_scalars(tmp_path)
    assert scalars["third"] == [(1, struct.unpack("<f", struct.pack("<f", 1 / 3))[0])]
    assert scalars["inf"] == [(1, math.inf)]
    assert scalars["huge"] == [(1, -math.inf)]
    assert scalars["ünicode/na me"] == [(1, 1.0)]


def test_slow_packages_are_not_imported() -> None:
    code = (
        "import sys, lockstep.runs; "
        "print([m for m in ('tensorboard', 'rich', 'matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(), check=True
    )
    assert done.stdout == "[]\n"
