"""What costs months elsewhere: weights that never arrive, samples of other weights, verifiers that hang, killed runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lockstep.api import override, resume, train
from lockstep.core.errors import DeadlineError, EnvError, StoppedError, WeightsError
from lockstep.core.request import WeightsVersion
from lockstep.core.trajectory import Trajectory, Verdict
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool
from lockstep.learn.model import ModelConfig, build
from lockstep.models.families import build_model
from lockstep.models.language import LanguageModel
from lockstep.rl.lm.batch import LearnConfig, make_batch
from lockstep.rl.lm.collector import Collector
from lockstep.rl.lm.publish import CopiedWeights, Delivery, Digests, Publisher, SharedWeights
from lockstep.rl.lm.report import rollout_metrics
from lockstep.rl.lm.rollout import RolloutConfig, Rollouts, new_engine
from lockstep.runs.directory import RunDirectory
from lockstep.runs.jsonl import read_jsonl
from lockstep.runs.record import read_run
from tests.rl.lm.digits import Digits, Sleepy
from tests.rl.lm.small import config, folder, run, untimed

SMALL = ModelConfig(width=32, hidden=64, num_layers=1, num_heads=2, vocab_size=270, max_context=64)


def rollouts(verifier: VerifierPool, task: Digits, limits: RolloutConfig | None = None) -> Rollouts:
    made = build(SMALL, ["say 1:"], 1, None)
    limits = limits or RolloutConfig(groups=3, group_size=2, max_tokens=3, memory_mb=8, max_sequences=8)
    engine = new_engine(made.model, made.tokenizer, limits)
    Publisher(engine, SharedWeights(made.model)).publish(0)
    return Rollouts(engine, task, task.problem, verifier, limits, seed=1)


def trained(model: LanguageModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


class Lost(Delivery):
    """Says that it delivered, and did not: the adapter or weights stayed where they were."""

    def __init__(self, inner: CopiedWeights) -> None:
        self.inner, self.held = inner, inner.deliver()

    def deliver(self) -> Digests:
        return self.held

    def expected(self) -> Digests:
        return self.inner.expected()


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_weights_that_never_arrived_are_refused(dtype: str) -> None:
    made = build(SMALL, ["say 1:"], 1, None)
    twin = build_model(made.config, 0, dtype, trainable=False)
    engine = new_engine(twin, made.tokenizer, RolloutConfig(memory_mb=8))
    copied = CopiedWeights(made.model, twin, made.config)
    publisher = Publisher(engine, copied)
    first = publisher.publish(0)
    trained(made.model)
    second = publisher.publish_next()
    assert first.digest != second.digest
    trained(made.model)
    lost = Publisher(engine, Lost(copied))
    trained(made.model)
    with pytest.raises(WeightsError, match="did not arrive"):
        lost.publish(2)


def test_samples_of_other_weights_are_refused() -> None:
    made = build(SMALL, ["say 1:"], 1, None)
    engine = new_engine(made.model, made.tokenizer, RolloutConfig(memory_mb=8))
    publisher = Publisher(engine, SharedWeights(made.model))
    now = publisher.publish(0)
    for stamp, message in (
        (WeightsVersion(0, "another"), "not of this policy"),
        (WeightsVersion(7, now.digest), "not of this policy"),
        (None, "not of this policy"),
    ):
        with pytest.raises(WeightsError, match=message):
            publisher.check([sampled(stamp)], 0, 0)
    assert publisher.check([sampled(now)], 0, 0) == 0.0
    trained(made.model)
    publisher.publish(1)
    assert publisher.check([sampled(now)], 1, 1) == 1.0
    with pytest.raises(WeightsError, match="staleness is 0"):
        publisher.check([sampled(now)], 1, 0)


def sampled(stamp: WeightsVersion | None) -> Trajectory:
    return Trajectory(
        problem=0,
        index=0,
        tokens=[1, 2],
        is_sampled=[False, True],
        logprobs=[0.0, -1.0],
        sampling_logprobs=[0.0, -1.0],
        versions=[None, stamp],
    )


def test_a_verifier_that_sleeps_for_ever_is_counted_and_teaches_nothing() -> None:
    with VerifierPool(VerifierConfig(workers=1, timeout_s=0.5)) as verifier:
        groups = rollouts(verifier, Sleepy()).collect(range(3))
        verdicts = [[one.score.verdict for one in group.trajectories if one.score] for group in groups]
        assert verdicts == [[Verdict.TIMED_OUT] * 2, [Verdict.SCORED] * 2, [Verdict.SCORED] * 2]
        batch = make_batch(groups, LearnConfig(), RolloutConfig(), 0)
        assert batch.num_unscored == 2
        metrics = rollout_metrics(groups, rollouts(verifier, Digits()).stats, verifier)
        assert metrics["verifier_timed_out"] == 2
        assert 0.0 <= metrics["reward"] <= 1.0


@pytest.mark.parametrize(("everywhere", "where"), [(True, "of 5 held-out problems"), (False, "of update 1")])
def test_a_verifier_that_judges_nothing_ends_the_run_with_its_reason(everywhere: bool, where: str) -> None:
    wish = config(task__name="tests.rl.lm.digits:Broken", rollout__groups=4, start__steps=0)
    wish = override(wish, "task.options", {"everywhere": everywhere})
    with pytest.raises(
        EnvError, match=rf"none of \d+ answers {where} could be judged; .*ZeroDivisionError: no such judge"
    ):
        run(wish)


@pytest.mark.parametrize(
    ("kind", "says"), [("NoProblem", "NoneType as problem"), ("Raising", "KeyError: 'no map' .digits.py")]
)
def test_a_task_that_poses_no_problem_is_an_error_that_says_where(kind: str, says: str) -> None:
    with pytest.raises(EnvError, match=says):
        run(config(task__name=f"tests.rl.lm.digits:{kind}"))


def test_rewards_that_are_all_the_same_and_answers_without_a_verdict_are_told_once(tmp_path: Path) -> None:
    wish = config(task__name="tests.rl.lm.digits:Moody", run__total_steps=3, start__steps=0)
    with folder(tmp_path, wish) as directory:
        run(wish, directory)
    (unjudged, alike) = read_run(directory.path).events()
    assert unjudged[0] == alike[0] == 1
    assert re.match(
        r"4 of 12 answers could not be judged .*problem \d+: failed: ValueError: not in the mood", unjudged[1]
    )
    assert alike[1].startswith("all 8 answers have the reward 0.25, and nothing tells the better ones")
    lines = read_jsonl(directory.metrics_path)
    assert [(line.get("first_unjudged"), line.get("first_alike"), line["unscored"]) for line in lines[1:]] == [
        (1, 1, 4)
    ] * 2
    verdicts = {(line["step"], line["group"]): line["verdict"] for line in read_jsonl(directory.samples_path)}
    assert list(verdicts.values()).count("failed") == 3


@pytest.mark.parametrize("everywhere", [True, False])
def test_what_the_start_has_cost_is_kept_when_the_first_update_fails(
    everywhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verifier that works in evaluations only has been evaluated once already: the resumed run does not do so again."""
    wish = config(task__name="tests.rl.lm.digits:Broken", rollout__groups=4, run__total_steps=1)
    wish = override(wish, "task.options", {"everywhere": everywhere})
    with pytest.raises(EnvError, match="could be judged") as caught:
        train(wish, out=tmp_path)
    (folder_of_run,) = tmp_path.iterdir()
    assert caught.value.__notes__ == [
        f"nothing up to its last checkpoint is lost; go on with: lockstep train --resume {folder_of_run}"
    ]
    monkeypatch.setattr("tests.rl.lm.digits.Broken.score", Digits.score)
    monkeypatch.setattr("lockstep.rl.lm.grpo.supervised_start", lambda *_: pytest.fail("started again"))
    assert resume(folder_of_run).result.steps == 1
    assert [line["step"] for line in read_jsonl(folder_of_run / "eval.jsonl")] == [0, 1]


def test_a_polite_stop_is_heard_in_the_supervised_start(tmp_path: Path) -> None:
    def stop(step: int, total: int, metrics: object) -> None:
        assert metrics == {"start": 1 / 3, "start_loss": pytest.approx(5.6, abs=1.0)}, "one step of it, and no more"
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError, match="stopped before update 1 of 4"):
        train(config(), out=tmp_path, on_progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_sampler_that_stops_answering_is_an_error_with_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with VerifierPool(VerifierConfig(workers=0)) as verifier:
        stuck, late = rollouts(verifier, Digits()), threading.Event()
        monkeypatch.setattr(stuck, "advance", lambda: late.wait(30.0))
        with Collector(stuck, 2, 1, 0, timeout_s=0.2) as collector:
            with pytest.raises(DeadlineError, match="2 of 2 groups did not end, and the sampler has been silent"):
                collector.take(0)
            late.set()


def test_a_batch_may_take_longer_than_a_sampler_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with VerifierPool(VerifierConfig(workers=0)) as verifier:
        slow = rollouts(verifier, Digits())
        advance, turns = slow.advance, iter([time.sleep] * 6)
        # Six steps of nothing before it samples at all.
        monkeypatch.setattr(slow, "advance", lambda: pause(0.1) if (pause := next(turns, None)) else advance())
        with Collector(slow, 2, 1, 0, timeout_s=0.4) as collector:
            assert len(collector.take(0)[0]) == 2


def test_an_error_of_the_sampler_reaches_the_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    with VerifierPool(VerifierConfig(workers=0)) as verifier:
        broken = rollouts(verifier, Digits())

        def advance() -> None:
            raise MemoryError("no room")

        monkeypatch.setattr(broken, "advance", advance)
        with Collector(broken, 2, 1, 0, timeout_s=5) as collector, pytest.raises(MemoryError, match="no room"):
            collector.take(0)


@pytest.mark.slow
@pytest.mark.parametrize(("staleness", "kills"), [(0, 100), (1, 4)])
def test_a_killed_run_loses_and_repeats_nothing(tmp_path: Path, staleness: int, kills: int) -> None:
    """SIGKILL at random moments until it is done. Synchronous: the same curve. Asynchronous: every group once, in order."""
    steps = 60
    wish = config(run__total_steps=steps, staleness=staleness)
    whole = folder(tmp_path / "whole", wish)
    began = time.monotonic()
    with whole:
        run(wish, whole)
    seconds = time.monotonic() - began
    killed = folder(tmp_path / "killed", wish)
    killed.finish()
    command = [sys.executable, "-c", KILLER, str(killed.path), str(kills), str(3 * seconds / steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=280, check=True)
    assert int(done.stdout) == kills, done.stderr
    found, expected = (read_jsonl(one.metrics_path) for one in (killed, whole))
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    if staleness == 0:
        assert [untimed(line) for line in found] == [untimed(line) for line in expected]
    problems = [[line["problem"] for line in read_jsonl(one.samples_path)] for one in (killed, whole)]
    assert problems[0] == problems[1]


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from lockstep.api import read_config
from lockstep.runs.directory import RunDirectory
from tests.rl.lm.small import run
path, kills, patience = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
rng, killed = random.Random(kills), 0
while True:
    child = os.fork()  # nothing is imported anew, so that a hundred kills take seconds
    if child == 0:
        with RunDirectory.open(path) as directory:
            run(read_config(path), directory, resume=True)
        os._exit(0)
    ends = time.monotonic() + rng.uniform(0.0, patience) if killed < kills else float("inf")
    while True:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone or time.monotonic() > ends:
            break
        time.sleep(0.001)
    if not gone:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
    elif status:
        sys.exit(f"the run ended with status {status}")
    else:
        break
print(killed)
"""


def test_a_run_directory_opens_again(tmp_path: Path) -> None:
    wish = config(run__total_steps=1)
    made = folder(tmp_path, wish)
    made.finish()
    with RunDirectory.open(made.path) as again:
        run(wish, again, resume=True)
    assert len(read_jsonl(made.metrics_path)) == 1
