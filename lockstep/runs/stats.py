"""Statistics over seeds and tasks, for results that are few and noisy.

Interquartile mean, stratified bootstrap, probability of improvement and performance profiles follow Agarwal et al.,
"Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021. `scores` of several tasks is a
sequence with one array of run scores for each task; tasks may have different numbers of runs.

Legend: R runs of a task, B bootstrap resamples, S all scores of all tasks, P thresholds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lockstep.core.errors import InputError

ScoresByTask = Sequence[Sequence[float] | np.ndarray]


@dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided confidence interval; NaN bounds where a single value leaves it open.

    >>> str(Interval(475.25, 460.0, 490.5))
    '475.2 [460.0, 490.5]'
    >>> str(Interval(475.25, math.nan, math.nan))
    '475.2 [-]'
    >>> str(Interval(0.4375, 0.25, 0.5))
    '0.438 [0.250, 0.500]'
    """

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 3 if abs(self.estimate) <= 1.0 else 1
        bounds = f"{self.low:.{digits}f}, {self.high:.{digits}f}" if math.isfinite(self.low) else "-"
        return f"{self.estimate:.{digits}f} [{bounds}]"


def sample_std(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation with n - 1; NaN for fewer than two values.

    >>> sample_std([1.0, 3.0])
    1.4142135623730951
    """
    array = _finite(values)
    return float(np.std(array, ddof=1)) if array.size > 1 else math.nan


def t_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """Mean with Student's interval: mean +- t(n-1) * std / sqrt(n). NaN bounds for a single value.

    Raises:
        InputError: no value, or one that is not finite.
    """
    array = _finite(values)
    mean = float(array.mean())
    if array.size < 2:
        return Interval(mean, math.nan, math.nan)
    half = t_quantile(0.5 + level / 2, array.size - 1) * sample_std(array) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half)


def mean_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """Mean with its interval: Wilson's (1927, eq. 5) where every value is 0 or 1, else Student's.

    >>> str(mean_interval([1.0, 0.0, 1.0, 1.0]))
    '0.750 [0.301, 0.954]'

    Raises:
        InputError: no value, or one that is not finite.
    """
    array = _finite(values)
    if not bool(((array == 0.0) | (array == 1.0)).all()):
        return t_interval(array, level=level)
    num, mean = array.size, float(array.mean())
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (mean + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(mean * (1 - mean) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    return Interval(mean, centre - half, centre + half)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda values_BR: values_BR.mean(axis=-1),
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic that reduces the last axis."""
    array = _finite(values)
    resampled_BS = _stratified([array], num_resamples, seed)
    return _percentile(float(statistic(array[None])[0]), statistic(resampled_BS), level)


def iqm(values: Sequence[float] | np.ndarray) -> float:
    """Interquartile mean: the mean after floor(n / 4) values are cut from either end.

    >>> iqm([0.0, 1.0, 2.0, 3.0, 100.0])
    2.0
    """
    return float(_iqm(_finite(values)[None])[0])


def iqm_interval(scores: ScoresByTask, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0) -> Interval:
    """IQM over all runs of all tasks with the stratified bootstrap's percentile interval.

    Runs are resampled within each task, so that every resample has each task's number of runs. NaN bounds where every
    task has a single run: their resamples are all the same and say nothing about other seeds.

    Raises:
        InputError: no task, a task without a run, or a score that is not finite.
    """
    tasks = _tasks(scores)
    estimate = float(_iqm(np.concatenate(tasks)[None])[0])
    if all(task.size < 2 for task in tasks):
        return Interval(estimate, math.nan, math.nan)
    return _percentile(estimate, _iqm(_stratified(tasks, num_resamples, seed)), level)


def probability_of_improvement(
    scores_x: ScoresByTask,
    scores_y: ScoresByTask,
    *,
    level: float = 0.95,
    num_resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Mean over tasks of P(a run of x beats a run of y), ties counting half (Mann-Whitney U over the number of pairs).

    Raises:
        InputError: the two have different numbers of tasks.
    """
    tasks_x, tasks_y = _tasks(scores_x), _tasks(scores_y)
    if len(tasks_x) != len(tasks_y):
        raise InputError(f"{len(tasks_x)} tasks against {len(tasks_y)}; expected the same tasks", field="scores_y")
    rng = np.random.default_rng(seed)
    estimates, resampled = [], []
    for x_R, y_R in zip(tasks_x, tasks_y, strict=True):
        estimates.append(_wins(x_R[None], y_R[None])[0])
        x_BR = x_R[rng.integers(0, x_R.size, (num_resamples, x_R.size))]
        y_BR = y_R[rng.integers(0, y_R.size, (num_resamples, y_R.size))]
        resampled.append(_wins(x_BR, y_BR))
    return _percentile(float(np.mean(estimates)), np.mean(resampled, axis=0), level)


def performance_profile(
    scores: ScoresByTask,
    thresholds: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    num_resamples: int = 2_000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fraction of runs that score above each threshold, averaged over tasks.

    Returns:
        (fraction_P, low_P, high_P), the latter two from the stratified bootstrap, pointwise.
    """
    tasks = _tasks(scores)
    grid_P = np.asarray(thresholds, dtype=np.float64)
    rng = np.random.default_rng(seed)
    fractions, resampled = [], []
    for task_R in tasks:
        above_RP = (task_R[:, None] > grid_P).astype(np.float64)
        fractions.append(above_RP.mean(axis=0))
        # How often each run is drawn is multinomial; counts avoid a B x R x P array.
        counts_BR = rng.multinomial(task_R.size, np.full(task_R.size, 1 / task_R.size), num_resamples)
        resampled.append(counts_BR @ above_RP / task_R.size)
    tail = 50 * (1 - level)
    low_P, high_P = np.percentile(np.mean(resampled, axis=0), [tail, 100 - tail], axis=0)
    return np.mean(fractions, axis=0), low_P, high_P


@functools.cache  # a plot asks for the same one at every group, and each takes 6 ms
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, by bisection of its distribution function.

    >>> round(t_quantile(0.975, 4), 4)
    2.7764
    """
    if not 0 < probability < 1 or degrees < 1:
        raise InputError(f"probability={probability}, degrees={degrees}; expected 0 < probability < 1 and degrees >= 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while _t_distribution(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _t_distribution(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_distribution(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0."""
    return 1 - 0.5 * _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function by its continued fraction (Abramowitz and Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    # Evaluated from the back: 200 terms are far beyond convergence for x below the mean.
    fraction = 1.0
    for m in range(200, 0, -1):
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + odd / (1 + even / fraction)
    return math.exp(log_front) / (a * fraction)


def _iqm(values_BS: np.ndarray) -> np.ndarray:
    size = values_BS.shape[-1]
    cut = size // 4
    return np.asarray(np.sort(values_BS, axis=-1)[..., cut : size - cut].mean(axis=-1))


def _stratified(tasks: Sequence[np.ndarray], num_resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([t[rng.integers(0, t.size, (num_resamples, t.size))] for t in tasks], axis=1)


def _wins(x_BR: np.ndarray, y_BR: np.ndarray) -> np.ndarray:
    difference = x_BR[:, :, None] - y_BR[:, None, :]
    return np.asarray(((difference > 0) + 0.5 * (difference == 0)).mean(axis=(1, 2)))


def _percentile(estimate: float, resampled_B: np.ndarray, level: float) -> Interval:
    tail = 50 * (1 - level)
    low, high = np.percentile(resampled_B, [tail, 100 - tail])
    return Interval(estimate, float(low), float(high))


def _tasks(scores: ScoresByTask) -> list[np.ndarray]:
    if len(scores) == 0:
        raise InputError("no tasks; expected at least one", field="scores")
    return [_finite(task) for task in scores]


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"got an array of shape {array.shape}; expected one score a run, at least one", field="scores")
    if not np.isfinite(array).all():
        raise InputError(f"{int((~np.isfinite(array)).sum())} of {array.size} scores are not finite", field="scores")
    return array
