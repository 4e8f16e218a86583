"""Verifiers that sleep, die, lie, print and eat memory: each item gets the verdict it deserves, its neighbours theirs."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.core.errors import ConfigError, EnvError, InputError
from lockstep.core.trajectory import Problem, Score, Verdict
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool
from tests.envs.lm.nasty import NastyTask, Stuck

SCORED, FAILED, TIMED_OUT = Verdict.SCORED, Verdict.FAILED, Verdict.TIMED_OUT
TIMEOUT_S = 0.5
EXPECTED = {
    "7": (SCORED, ""),
    "wrong": (SCORED, ""),
    "print": (SCORED, ""),
    "float 0.5": (SCORED, ""),
    "raise no answer": (FAILED, "ValueError: no answer (nasty.py:"),
    "sys.exit 3": (FAILED, "SystemExit: 3"),
    "nan": (FAILED, "finite"),
    "float_nan": (FAILED, "returned nan"),
    "none": (FAILED, "returned None"),
    "text": (FAILED, "returned '1.0'"),
    "lambda": (FAILED, "cannot be sent"),
    "unprintable": (FAILED, "RuntimeError"),
    "memory 3000": (FAILED, "MemoryError"),
    "exit 5": (FAILED, "exit status 5"),
    "exit 0": (FAILED, "exit status 0"),
    "segfault": (FAILED, "SIGSEGV"),
    "base": (FAILED, "died"),
    "sleep 60": (TIMED_OUT, "timeout_s=0.5"),
    "busy": (TIMED_OUT, "timeout_s=0.5"),
}
CONTAINED = ("memory 3000", "exit 5", "exit 0", "segfault", "base", "sleep 60", "busy")
CHEAP = [text for text in EXPECTED if text not in CONTAINED]


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(VerifierConfig(workers=2, timeout_s=TIMEOUT_S, memory_mb=1500)) as pool:
        yield pool


def items(texts: list[str]) -> list[tuple[Problem, str]]:
    return [(NastyTask().problem(7), text) for text in texts]


def check(texts: list[str], scores: list[Score]) -> None:
    assert len(scores) == len(texts)
    for text, score in zip(texts, scores, strict=True):
        verdict, detail = EXPECTED[text]
        assert (score.verdict, detail in score.detail) == (verdict, True), (text, score)
        assert math.isfinite(score.value) == score.is_scored
        if text in ("7", "wrong"):
            assert score.value == (text == "7")


def test_every_nasty_verifier_gets_its_verdict_and_harms_no_other(pool: VerifierPool) -> None:
    texts = [text for nasty in EXPECTED for text in (nasty, "7", "wrong")]
    before = dict(pool.counts)
    check(texts, pool.score_all(NastyTask(), items(texts)))
    given_now = {verdict: pool.counts[verdict] - before[verdict] for verdict in Verdict}
    assert given_now[TIMED_OUT] == 2
    assert sum(given_now.values()) == len(texts)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([*CHEAP, "exit 5", "segfault"]), max_size=70))
def test_any_mixture_in_any_order(pool: VerifierPool, texts: list[str]) -> None:
    check(texts, pool.score_all(NastyTask(), items(texts)))


def test_what_a_verifier_started_dies_with_it(pool: VerifierPool, tmp_path: Path) -> None:
    [score] = pool.score_all(NastyTask(), items([f"child {tmp_path / 'pid'}"]))
    assert score.verdict is TIMED_OUT
    child = int((tmp_path / "pid").read_text())
    limit = time.monotonic() + 5
    while Path(f"/proc/{child}/status").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_threads_share_the_workers(pool: VerifierPool) -> None:
    results: dict[int, list[Score]] = {}
    texts = {k: random.Random(k).choices([*CHEAP, "exit 5"], k=40) for k in range(4)}

    def judge(k: int) -> None:
        results[k] = pool.score_all(NastyTask(), items(texts[k]))

    threads = [threading.Thread(target=judge, args=(k,)) for k in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for k in texts:
        check(texts[k], results[k])


def test_an_item_costs_far_less_than_a_millisecond(pool: VerifierPool) -> None:
    many = items(["7"] * 5000)
    pool.score_all(NastyTask(), many[:100])
    started = time.perf_counter()
    assert {score.value for score in pool.score_all(NastyTask(), many)} == {1.0}
    assert (time.perf_counter() - started) / len(many) < 1e-3


def test_in_process_mode_keeps_verdicts_and_deadline() -> None:
    with VerifierPool(VerifierConfig(workers=0, timeout_s=0.2)) as pool:
        texts = [text for text in CHEAP if text not in ("lambda", "print")]
        check(texts, pool.score_all(NastyTask(), items(texts)))
        [late] = pool.score_all(NastyTask(), items(["busy"]))
        assert late.verdict is TIMED_OUT
        late_elsewhere: list[Score] = []
        thread = threading.Thread(
            target=lambda: late_elsewhere.extend(pool.score_all(NastyTask(), items(["sleep 0.3"])))
        )
        thread.start()
        thread.join(10)
        assert late_elsewhere[0].verdict is TIMED_OUT
        with pytest.raises(KeyboardInterrupt):
            pool.run(_Interrupted(), [("score", (None, ""))])


class _Interrupted:
    def score(self, problem: object, text: str) -> float:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("raise", EnvError, "no file"), ("exit", EnvError, "exit status 4"), ("sleep", TimeoutError, r"start_s=0\.5")],
)
def test_a_task_that_cannot_load_is_an_error_not_a_score(kind: str, error: type[Exception], message: str) -> None:
    with (
        VerifierPool(VerifierConfig(workers=1, start_s=0.5 if kind == "sleep" else 60.0)) as pool,
        pytest.raises(error, match=message),
    ):
        pool.score_all(Stuck(kind), [(Problem(index=0, prompt=""), "")])


def test_wrong_use_is_told(pool: VerifierPool) -> None:
    with pytest.raises(ConfigError, match="workers=0"):
        pool.run(lambda: None, [("score", (None, ""))])
    with pytest.raises(ConfigError, match="above 0"):
        VerifierPool(VerifierConfig(timeout_s=0))
    with VerifierPool() as closed:
        pass
    with pytest.raises(ConfigError, match="closed"):
        closed.score_all(NastyTask(), items(["7"]))
    assert pool.score_all(NastyTask(), []) == []


def test_an_unscored_score_has_no_number_to_learn_from() -> None:
    assert math.isnan(Score.failed("x").value)
    with pytest.raises(InputError, match="finite"):
        Score.of(math.inf)
    with pytest.raises(InputError, match="exactly one"):
        Problem(index=0)
