"""Rollout workers: they sample what the learner's process would, bit for bit, and losing one loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lockstep import kernels
from lockstep.api import override
from lockstep.core.errors import ConfigError, InputError, WeightsError, WorkerError
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool
from lockstep.learn.model import TrainedModel, build
from lockstep.models.families import hf_tensors
from lockstep.rl.lm import worker
from lockstep.rl.lm.fleet import MAX_FRUITLESS, Fleet
from lockstep.rl.lm.rollout import Group, RolloutConfig, Rollouts
from lockstep.rl.lm.sampler import new_sampler
from lockstep.rl.lm.threads import ThreadShare
from lockstep.runs.directory import RunDirectory
from lockstep.runs.jsonl import read_jsonl
from lockstep.runs.record import read_run
from tests.rl.lm.digits import Digits
from tests.rl.lm.small import config, folder, run, untimed
from tests.rl.lm.test_turns import collect

LIMITS = RolloutConfig(groups=4, group_size=3, max_tokens=12, memory_mb=8, max_sequences=6)
Events = list[tuple[str, str]]


@pytest.fixture(scope="module")
def made() -> TrainedModel:
    return build(config().model, ["say 1:"], 1, None)


def sampled(made: TrainedModel, limits: RolloutConfig, events: Events | None = None) -> list[Group]:
    task, told = Digits(), [] if events is None else events
    with (
        VerifierPool(VerifierConfig(workers=0)) as verifier,
        new_sampler(made, limits, None, on_event=lambda *event: told.append(event)) as (engine, publisher),
    ):
        publisher.publish(3)
        return Rollouts(engine, task, task.problem, verifier, limits, seed=1).collect(range(4))


def acting(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """In the third step that any worker makes it does something else before: die, sleep."""
    plain, count, lock = worker._Worker.step, [0], threading.Lock()

    def step(self: Any) -> Any:
        with lock:
            count[0] += 1
            acts = count[0] == 3
        if acts:
            act()
        return plain(self)

    monkeypatch.setattr(worker._Worker, "step", step)


def die() -> None:
    raise SystemExit


@pytest.mark.parametrize("changes", [{}, {"group_size": 2, "greedy_baseline": True, "top_k": 20}, {"dtype": "int8"}])
def test_workers_sample_what_the_learners_process_would(
    made: TrainedModel, threads: None, changes: dict[str, Any]
) -> None:
    here = sampled(made, replace(LIMITS, **changes))
    assert sampled(made, replace(LIMITS, workers=3, **changes)) == here


@pytest.mark.slow
def test_turns_of_an_episode_stay_where_its_tokens_are_known(threads: None) -> None:
    (here, rollouts), (apart, others) = (collect(400, workers) for workers in (0, 2))
    assert apart == here
    assert {one.num_turns for one in here.trajectories} == {3}
    assert others.stats.num_cached == rollouts.stats.num_cached > 0


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"adapter__rank": 4, "learner__optimiser__lr": 0.02}, marks=pytest.mark.slow)]
)
def test_a_run_with_workers_is_the_run_without(threads: None, changes: dict[str, Any]) -> None:
    small = {"run__total_steps": 2, "start__steps": 1, "evaluation__problems": 2, **changes}
    _, here = run(config(**small))
    _, apart = run(config(rollout__workers=2, **small))
    assert apart == here
    assert [line["mismatch_max"] for _, line in apart if "mismatch_max" in line] == [0.0] * len(apart)


@pytest.mark.slow
def test_workers_keep_the_bound_of_staleness(threads: None) -> None:
    _, found = run(config("cispo", staleness=1, rollout__workers=2, start__steps=0, evaluation__problems=2))
    assert max(line["behind"] for _, line in found) == 1.0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_costs_nothing_but_time(
    made: TrainedModel, threads: None, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    here = sampled(made, LIMITS)
    acting(monkeypatch, die)
    events: Events = []
    assert sampled(made, replace(LIMITS, workers=workers), events) == here
    ((kind, text),) = events
    assert kind == "worker_lost"
    assert "ended" in text
    assert "samples begin anew" in text


def test_a_lost_worker_is_told_and_counted(tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    acting(monkeypatch, die)
    wish = config(run__total_steps=1, rollout__workers=2, start__steps=0, evaluation__problems=2)
    with folder(tmp_path, wish) as directory:
        run(wish, directory)
    assert [line["worker_lost"] for line in read_jsonl(directory.metrics_path)] == [1.0]
    ((step, text),) = read_run(directory.path).events()
    assert step == 0
    assert text.startswith("rollout worker")


@pytest.mark.slow
def test_a_worker_that_stops_answering_is_replaced(
    made: TrainedModel, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = sampled(made, LIMITS)
    release = threading.Event()
    acting(monkeypatch, lambda: assert_woken(release))
    events: Events = []
    try:
        assert sampled(made, replace(LIMITS, workers=2, worker_timeout_s=2.0), events) == here
    finally:
        release.set()
    assert ["silent for worker_timeout_s=2" in text for _, text in events] == [True]


def assert_woken(release: threading.Event) -> None:
    assert release.wait(30)


@pytest.mark.parametrize("dies_in", ["build_model", "_Worker.step"])
def test_workers_that_die_again_and_again_end_the_run(
    made: TrainedModel, threads: None, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    monkeypatch.setattr(f"lockstep.rl.lm.worker.{dies_in}", lambda *_, **__: die())
    events: Events = []
    with pytest.raises(WorkerError, match=f"{MAX_FRUITLESS} times in a row"):
        sampled(made, replace(LIMITS, workers=1), events)
    assert len(events) == MAX_FRUITLESS


def test_a_request_that_kills_its_workers_ends_the_run(
    made: TrainedModel, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = worker._Worker._add
    poisoned = lambda self, ticket, request: die() if request.id == "g2" else add(self, ticket, request)  # noqa: E731
    monkeypatch.setattr(worker._Worker, "_add", poisoned)
    monkeypatch.setattr("lockstep.rl.lm.fleet.MAX_LOSSES", 2)
    with pytest.raises(WorkerError, match="was aboard 2 lost workers"):
        sampled(made, replace(LIMITS, workers=2))


@pytest.mark.slow
def test_a_worker_that_cannot_start_or_serve_says_why(
    made: TrainedModel, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Fleet(made, replace(LIMITS, workers=1))) as fleet:
        publish(fleet, made)
        fleet.add(Request(id="long", prompt=(1,) * 500, params=SamplingParams(seed=1)))
        with pytest.raises(InputError, match="prompt is too long: 500 tokens"):
            until_raised(fleet)
    monkeypatch.setattr(worker, "build_model", lambda *_, **__: 1 / 0)
    with (
        closing(Fleet(made, replace(LIMITS, workers=1))) as fleet,
        pytest.raises(WorkerError, match="ZeroDivisionError"),
    ):
        until_raised(fleet)
    monkeypatch.setattr(worker, "build_model", lambda *_, **__: time.sleep(2))
    with (
        closing(Fleet(made, replace(LIMITS, workers=1, worker_start_s=0.2))) as fleet,
        pytest.raises(WorkerError, match=r"did not start in worker_start_s=0\.2"),
    ):
        until_raised(fleet)


def until_raised(fleet: Fleet) -> None:
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        fleet.step()


def publish(fleet: Fleet, made: TrainedModel, digest: str = "") -> None:
    held = fleet.deliver("model", hf_tensors(made.model, made.config))
    fleet.publish(0, digest or held)


def test_a_worker_refuses_a_digest_that_is_not_its_own(made: TrainedModel, threads: None) -> None:
    with closing(Fleet(made, replace(LIMITS, workers=1))) as fleet:
        publish(fleet, made, "another")
        with pytest.raises(WeightsError, match="published with digest another"):
            until_raised(fleet)


def test_weights_that_a_worker_did_not_take_are_refused(
    made: TrainedModel, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "fill_from", lambda *_: None)
    with pytest.raises(WeightsError, match="version 3 did not arrive"):
        sampled(made, replace(LIMITS, workers=1))


@pytest.mark.parametrize(
    ("threads", "workers", "staleness", "learner", "worker"),
    [
        (8, 0, 0, 8, 8),
        (8, 3, 0, 8, 2),
        (2, 0, 1, 1, 1),
        (8, 0, 2, 7, 1),
        (8, 2, 1, 4, 2),
        (8, 3, 1, 5, 1),
        (2, 3, 1, 1, 1),
    ],
)
def test_threads_are_used_once(threads: int, workers: int, staleness: int, learner: int, worker: int) -> None:
    share = ThreadShare.of(threads, workers, staleness)
    assert (share.all, share.learner, share.worker) == (threads, learner, worker)
    if staleness and threads > workers:
        assert share.learner + share.worker * max(workers, 1) == threads


@pytest.mark.slow
def test_the_learner_keeps_to_its_share_and_workers_to_theirs(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(kernels, "set_num_threads", lambda num: told.append((threading.current_thread().name, num)))
    monkeypatch.setattr(kernels, "num_threads", lambda: 0)
    plans: list[int] = []
    hire = Fleet._hire
    monkeypatch.setattr(Fleet, "_hire", lambda self, *args: (plans.append(self._plan.threads), hire(self, *args))[1])
    wish = config("cispo", staleness=1, rollout__workers=2, run__threads=8, run__total_steps=1, start__steps=0)
    run(wish)
    assert plans == [2, 2]
    assert [num for name, num in told if name == "MainThread"] == [8, 4, 0]


def test_impossible_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"workers=-1"):
        RolloutConfig(workers=-1)


@pytest.mark.slow
def test_processes_that_are_killed_or_stopped_cost_nothing_but_time(made: TrainedModel) -> None:
    """SIGKILL to one worker and SIGSTOP to the other, both with samples aboard."""
    here = sampled(made, LIMITS)
    limits = replace(LIMITS, workers=2, worker_timeout_s=5.0)
    events: Events = []
    task = Digits()
    with (
        VerifierPool(VerifierConfig(workers=0)) as verifier,
        new_sampler(made, limits, None, on_event=lambda *event: events.append(event)) as (engine, publisher),
    ):
        assert isinstance(engine, Fleet)
        publisher.publish(3)
        while not all(member.is_ready for member in engine._members):
            engine.step()
        publisher.publish(4)
        rollouts = Rollouts(engine, task, task.problem, verifier, limits, seed=1)
        for number in range(4):
            rollouts.start(number)
        for member, number in zip(engine._members, (signal.SIGKILL, signal.SIGSTOP), strict=True):
            assert member.aboard
            assert member.child.pid is not None
            os.kill(member.child.pid, number)
        groups: dict[int, Group] = {}
        while len(groups) < 4:
            rollouts.advance()
            groups |= {number: group for number in range(4) if (group := rollouts.pop(number)) is not None}
    for group in (*here, *groups.values()):
        for one in group.trajectories:
            one.versions = []
    assert [groups[number] for number in range(4)] == here
    assert [kind for kind, _ in events] == ["worker_lost"] * 2
    assert "killed by SIGKILL" in events[0][1]
    assert "silent for worker_timeout_s=5" in events[1][1]


@pytest.mark.slow
def test_workers_end_with_a_learner_that_is_killed_and_the_run_goes_on(tmp_path: Path) -> None:
    wish = config(rollout__workers=1)
    whole, killed = folder(tmp_path / "whole", config()), folder(tmp_path / "killed", wish)
    with whole:
        run(config(), whole)
    killed.finish()
    command = [sys.executable, "-c", LEARNER, str(killed.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as learner:
        assert learner.stdout is not None
        workers = [int(pid) for pid in learner.stdout.readline().split()]
        learner.kill()
    assert len(workers) == 1
    limit = time.monotonic() + 30
    while any(map(is_alive, workers)):
        assert time.monotonic() < limit
        time.sleep(0.05)
    with RunDirectory.open(killed.path) as directory:
        run(wish, directory, resume=True)
    lines = [[untimed(line) for line in read_jsonl(one.metrics_path)] for one in (killed, whole)]
    assert lines[0] == lines[1]


LEARNER = """
import multiprocessing, sys, time
from pathlib import Path
from lockstep.api import read_config
from lockstep.learn.session import Session
from lockstep.rl.lm import grpo
from lockstep.runs.directory import RunDirectory
def hold(step, total, metrics):
    if step == 2 and "eval" not in metrics:
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(100)
with RunDirectory.open(Path(sys.argv[1])) as directory:
    config = read_config(directory.path)
    with Session(config.run, directory=directory, on_progress=hold) as session:
        grpo.train(config, session)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_kills_of_the_learner_and_of_workers_lose_and_repeat_nothing(tmp_path: Path, staleness: int) -> None:
    """At random moments, a fifth of them the learner's. `LOCKSTEP_KILLS` is their number, such as 100 for minutes of it."""
    kills = int(os.environ.get("LOCKSTEP_KILLS", "2"))
    wish = config(run__total_steps=3 * kills + 5, staleness=staleness, evaluation__problems=2, start__steps=1)
    whole, killed = folder(tmp_path / "whole", wish), folder(tmp_path / "killed", override(wish, "rollout.workers", 2))
    with whole:
        run(wish, whole)
    killed.finish()
    command = [sys.executable, "-c", KILLER, str(killed.path), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 60 * kills, check=False)
    assert done.returncode == 0, done.stderr
    of_learner, of_workers = map(int, done.stdout.split())
    assert of_learner + of_workers == kills
    assert min(of_learner, of_workers) > 0
    lines = [[untimed(line) for line in read_jsonl(one.metrics_path)] for one in (killed, whole)]
    assert [line["step"] for line in lines[0]] == list(range(1, wish.run.total_steps + 1))
    for line in lines[0]:
        line.pop("worker_lost", None)  # a kill of the learner right afterwards takes the count back
    if staleness == 0:
        assert lines[0] == lines[1]
    problems = [[line["problem"] for line in read_jsonl(one.samples_path)] for one in (killed, whole)]
    assert problems[0] == problems[1]


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from lockstep.api import read_config
from lockstep.core.errors import WorkerError
from lockstep.runs.directory import RunDirectory
from tests.rl.lm.small import run
path, kills = Path(sys.argv[1]), int(sys.argv[2])
rng, done, lines = random.Random(kills), {True: 0, False: 0}, path / "metrics.jsonl"

def workers(learner):  # the oldest first: those that have sampled
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if rest[0] != "Z":
            parents[int(stat.parent.name)] = int(rest[1]), int(rest[19])
    servers = [pid for pid, (parent, _) in parents.items() if parent == learner]
    return sorted((pid for pid, (parent, _) in parents.items() if parent in servers), key=lambda pid: parents[pid][1])

def begun():
    child = os.fork()  # nothing is imported anew
    if child == 0:
        try:
            with RunDirectory.open(path) as directory:
                run(read_config(path), directory, resume=True)
        except WorkerError as error:  # one number of worker was killed three times before it had finished a sample
            os._exit(3 if "finished no sample" in str(error) else 1)
        os._exit(0)
    return child

def size():
    return lines.stat().st_size if lines.exists() else 0

learner, seconds = begun(), 0.05
while True:
    before, began = size(), time.monotonic()
    while (gone := os.waitpid(learner, os.WNOHANG))[0] == 0 and (size() <= before or sum(done.values()) == kills):
        time.sleep(0.002)
    if gone[0] and os.waitstatus_to_exitcode(gone[1]) == 3:
        learner = begun()
        continue
    if gone[0]:
        if gone[1] or sum(done.values()) < kills:
            sys.exit(f"the run ended with status {gone[1]} after {done} kills")
        break
    time.sleep(rng.uniform(0.0, 0.3))
    of_learner = rng.random() < 0.2 or sum(done.values()) == 1
    alive = [] if of_learner else workers(learner)
    if not of_learner and not alive:
        continue
    try:
        os.kill(learner if of_learner else alive[0], signal.SIGKILL)
    except ProcessLookupError:
        continue
    done[of_learner] += 1
    if of_learner:
        os.waitpid(learner, 0)
        learner = begun()
print(done[True], done[False])
"""
