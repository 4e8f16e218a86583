"""Statistics against closed forms, direct enumeration and known coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lockstep.core.errors import InputError
from lockstep.runs.stats import (
    bootstrap_interval,
    iqm,
    iqm_interval,
    performance_profile,
    probability_of_improvement,
    sample_std,
    t_interval,
    t_quantile,
)


@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.995, 0.9995])
def test_t_quantile_closed_forms(probability: float) -> None:
    centred = probability - 0.5
    assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * centred), rel=1e-9)
    two = 2 * centred * math.sqrt(2 / (1 - 4 * centred**2))
    assert t_quantile(probability, 2) == pytest.approx(two, rel=1e-9)
    four = 4 * probability * (1 - probability)
    shape = math.cos(math.acos(math.sqrt(four)) / 3) / math.sqrt(four)
    assert t_quantile(probability, 4) == pytest.approx(2 * math.sqrt(shape - 1), rel=1e-9)
    assert t_quantile(1 - probability, 3) == -t_quantile(probability, 3)


@pytest.mark.parametrize(
    ("degrees", "expected"), [(3, 3.182446), (9, 2.262157), (29, 2.045230), (99, 1.984217), (1000, 1.962339)]
)
def test_t_quantile_tables(degrees: int, expected: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(expected, abs=1e-6)


def test_t_quantile_tends_to_the_normal() -> None:
    assert t_quantile(0.975, 10**7) == pytest.approx(1.959964, abs=1e-5)


def test_t_interval_by_hand() -> None:
    interval = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-5)
    assert math.isnan(t_interval([7.0]).low)
    assert math.isnan(sample_std([7.0]))
    assert t_interval([7.0, 7.0]).low == 7.0


def test_t_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = [(i := t_interval(rng.normal(3, 2, 5))).low < 3 < i.high for _ in range(1000)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_iqm_is_the_trimmed_mean() -> None:
    assert iqm([5.0]) == 5.0
    assert iqm([1.0, 2.0, 6.0]) == 3.0  # floor(3 / 4) = 0 cut
    assert iqm([9.0, 1.0, 2.0, -50.0]) == 1.5
    assert iqm([100.0, 3.0, 1.0, 2.0, -9.0, 4.0, 5.0, 6.0]) == 3.5


def test_iqm_interval_against_enumeration() -> None:
    """Four runs, one task: all 256 resamples give the bootstrap's distribution exactly."""
    scores = [0.0, 1.0, 4.0, 9.0]
    every = [iqm(list(drawn)) for drawn in itertools.product(scores, repeat=4)]
    low, high = np.percentile(every, [2.5, 97.5])
    interval = iqm_interval([scores], num_resamples=100_000)
    assert interval.estimate == 2.5
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.26)  # one step of the distribution


def test_one_run_has_no_interval_over_runs() -> None:
    interval = iqm_interval([[500.0]])
    assert interval.estimate == 500.0
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert math.isfinite(iqm_interval([[500.0], [1.0, 2.0]]).low)


def test_bootstrap_is_stratified() -> None:
    """Tasks far apart with no spread inside: resampling within tasks has no variance at all, across them it would."""
    tasks = [[0.0] * 5, [10.0] * 5, [20.0] * 5]
    interval = iqm_interval(tasks)
    assert (interval.low, interval.estimate, interval.high) == (10.0, 10.0, 10.0)


def test_bootstrap_interval_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 400)
    interval = bootstrap_interval(values)
    half = 1.96 * sample_std(values) / 20
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)
    median = bootstrap_interval([1.0, 2.0, 3.0], lambda values_BR: np.median(values_BR, axis=-1))
    assert (median.estimate, median.low, median.high) == (2.0, 1.0, 3.0)


def test_same_seed_same_interval() -> None:
    scores = [np.random.default_rng(1).normal(size=20)]
    assert iqm_interval(scores, seed=3) == iqm_interval(scores, seed=3)
    assert iqm_interval(scores, seed=3) != iqm_interval(scores, seed=4)


def test_probability_of_improvement() -> None:
    assert probability_of_improvement([[2.0, 3.0]], [[0.0, 1.0]]).estimate == 1.0
    assert probability_of_improvement([[1.0, 1.0]], [[1.0]]).estimate == 0.5
    pairs = probability_of_improvement([[1.0, 4.0, 6.0], [0.0]], [[2.0, 5.0], [1.0]])
    assert pairs.estimate == pytest.approx((3 / 6 + 0) / 2)
    assert pairs.low <= pairs.estimate <= pairs.high
    with pytest.raises(InputError, match="same tasks"):
        probability_of_improvement([[1.0]], [[1.0], [2.0]])


def test_performance_profile() -> None:
    fraction, low, high = performance_profile([[1.0, 2.0], [3.0, 4.0, 5.0, 6.0]], [0.0, 1.0, 3.5, 6.0])
    assert fraction.tolist() == [1.0, 0.75, 0.375, 0.0]
    assert ((low <= fraction) & (fraction <= high)).all()
    assert low[1] == 0.5
    assert high[1] == 1.0


@pytest.mark.parametrize("bad", [[], [math.nan, 1.0], [[1.0, 2.0]]])
def test_bad_scores_are_refused(bad: list[float]) -> None:
    with pytest.raises(InputError):
        iqm(bad)
    with pytest.raises(InputError):
        iqm_interval([bad])
    with pytest.raises(InputError):
        iqm_interval([])
