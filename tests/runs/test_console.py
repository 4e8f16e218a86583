"""The display is readable, rare and cheap."""

from __future__ import annotations

import io
import itertools
import math
import time

from lockstep.runs.console import ProgressDisplay, curve_text, print_curve


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, *, seconds: float, every: float, total: int = 1000, title: str = "ppo") -> None:
    now = [0.0]
    num_updates = int(seconds / every)
    with ProgressDisplay(total, title, stream=stream, clock=lambda: now[0]) as display:
        for i in range(1, num_updates + 1):
            now[0] = i * every
            display.update(total * i // num_updates, {"return": 100.0 * i / num_updates, "loss": 0.0123})


def test_plain_lines_come_every_two_seconds_and_at_the_end() -> None:
    stream = io.StringIO()
    run(stream, seconds=9.0, every=0.01)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "ppo:  22% | 222/1,000 | 111 steps/s | ETA 0:07 | return 22.2 | loss 0.0123"
    assert lines[-1] == "ppo: 100% | 1,000/1,000 | 111.1 steps/s | took 0:09 | return 100 | loss 0.0123"
    assert "\x1b" not in stream.getvalue()


def test_a_short_run_prints_one_line() -> None:
    stream = io.StringIO()
    run(stream, seconds=1.0, every=0.1, title="")
    assert stream.getvalue() == "100% | 1,000/1,000 | 1,000 steps/s | took 0:01 | return 100 | loss 0.0123\n"


def test_metrics_keep_their_last_value_and_columns_choose() -> None:
    stream = io.StringIO()
    with ProgressDisplay(10, columns=("return", "absent"), stream=stream, clock=lambda: 0.0) as display:
        display.update(1, {"return": 5.0, "loss": 1.0})
        display.update(2, {"loss": math.nan})
        display.update(3)
    assert stream.getvalue() == " 30% | 3/10 | 0 steps/s | took 0:00 | return 5\n"


def test_a_resumed_run_counts_its_own_steps_in_the_rate() -> None:
    stream = io.StringIO()
    now = [0.0]
    with ProgressDisplay(1000, start_step=900, stream=stream, clock=lambda: now[0]) as display:
        now[0] = 10.0
        display.update(950)
    assert " 95% | 950/1,000 | 5 steps/s | ETA 0:10" in stream.getvalue()


def test_an_update_that_ends_beyond_the_total_leaves_no_time() -> None:
    stream = io.StringIO()
    now = [0.0]
    with ProgressDisplay(10, stream=stream, clock=lambda: now[0]) as display:
        now[0] = 10.0
        display.update(256)
    assert "100% | 256/10 | 25.6 steps/s | ETA 0:00" in stream.getvalue()


def test_live_display_on_a_terminal() -> None:
    stream = Terminal()
    run(stream, seconds=3.0, every=0.01)
    text = stream.getvalue()
    assert "1,000/1,000" in text
    assert "took 0:03" in text
    assert "loss" in text
    assert text.count("steps/s") <= 3 * 4 + 4  # two when it opens, two when it closes
    assert text.endswith("\n") or text.endswith("\x1b[?25h")


def test_an_update_that_draws_nothing_costs_next_to_nothing() -> None:
    """Against what a drawn one costs, on the same machine in the same moment: 75 times as much when measured."""
    metrics = {"return": 1.0, "length": 2.0, "loss/policy": 3.0, "loss/value": 4.0}
    costs = []
    for seconds_between in (0.0, 1e6):
        clock = itertools.count(0.0, seconds_between).__next__
        display = ProgressDisplay(10**9, stream=io.StringIO(), clock=clock)
        rounds = []
        for _ in range(5):
            start = time.perf_counter()
            for step in range(500):
                display.update(step, metrics)
            rounds.append(time.perf_counter() - start)
        costs.append(min(rounds))
        display.close()
    assert 4 * costs[0] < costs[1], costs


def test_curve_shows_rise_and_range() -> None:
    text = curve_text(range(0, 1000, 10), [float(i) for i in range(100)], title="return", width=20, height=5)
    lines = text.splitlines()
    assert len(lines) == 5 + 3
    assert lines[0] == "return"
    assert lines[1].strip().startswith("97 |")
    assert lines[5].strip().startswith("2 |")
    assert lines[1].rstrip().endswith("*")
    assert lines[5].split("|")[1].startswith("*")
    assert lines[-1].split() == ["0", "990", "steps"]
    assert sum(line.count("*") for line in lines) == 20
    assert text.isascii()


def test_curve_of_odd_inputs() -> None:
    assert curve_text([], []) == "episode return: no values"
    assert curve_text([1, 2], [math.nan, math.inf]) == "episode return: no values"
    assert "*" in curve_text([5], [3.0])
    assert "*" in curve_text([1, 2, 3], [4.0, 4.0, 4.0])
    stream = io.StringIO()
    print_curve([1, 2], [math.nan, 7.0], stream=stream)
    assert stream.getvalue().count("*") == 1


def test_what_happened_stays_above_the_display() -> None:
    for stream in (io.StringIO(), Terminal()):
        with ProgressDisplay(10, stream=stream, clock=lambda: 0.0) as display:
            display.say("step 3: a worker [1] was lost")
        assert "step 3: a worker [1] was lost\n" in stream.getvalue()
