"""Learning curves and score bars as PNG, through the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.core.errors import ConfigError, InputError
from lockstep.core.extras import require
from lockstep.runs.stats import Interval, t_quantile

# Okabe and Ito's palette, which readers with any colour vision tell apart; yellow is left out as too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_INK, _FAINT = "#333333", "#DDDDDD"
NUM_GRID = 256


@dataclass(frozen=True)
class Curve:
    """One run's values by step; steps increase, values are finite."""

    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Band:
    """Mean of several runs on a common grid of steps, with a pointwise interval (NaN for a single run)."""

    steps_G: np.ndarray
    mean_G: np.ndarray
    low_G: np.ndarray
    high_G: np.ndarray
    num_runs: int


def band_of(curves: Sequence[Curve], *, level: float = 0.95, smooth: int = 1) -> Band:
    """Interpolate runs on a common grid and take mean and Student's interval at each point.

    The grid ends where the shortest run ends: beyond it the mean would be of other runs.

    Args:
        curves: one a run.
        level: of the interval.
        smooth: width in points of a centred moving average, taken of each run before interpolation.

    Raises:
        InputError: no curve, an empty one, or curves whose steps do not overlap.
    """
    if not curves or any(len(curve.steps) == 0 for curve in curves):
        raise InputError("a run without values cannot be plotted; leave it out", field="curves")
    start = max(float(curve.steps[0]) for curve in curves)
    end = min(float(curve.steps[-1]) for curve in curves)
    if end < start:
        raise InputError(f"runs do not overlap: one starts at step {start:.0f}, one ends at {end:.0f}", field="curves")
    steps_G = np.linspace(start, end, NUM_GRID)
    values_RG = np.stack([np.interp(steps_G, curve.steps, _smoothed(curve.values, smooth)) for curve in curves])
    mean_G = values_RG.mean(axis=0)
    if len(curves) == 1:
        nothing_G = np.full_like(mean_G, np.nan)
        return Band(steps_G, mean_G, nothing_G, nothing_G, 1)
    scale = t_quantile(0.5 + level / 2, len(curves) - 1) / np.sqrt(len(curves))
    half_G = scale * values_RG.std(axis=0, ddof=1)
    return Band(steps_G, mean_G, mean_G - half_G, mean_G + half_G, len(curves))


def plot_curves(
    groups: Mapping[str, Sequence[Curve]],
    out: Path,
    *,
    title: str = "",
    ylabel: str = "episode return",
    xlabel: str = "environment steps",
    level: float = 0.95,
    smooth: int = 1,
) -> Path:
    """Draw one line a group, the mean over its runs, with a band for the confidence interval and thin lines for runs.

    Args:
        groups: label -> runs (seeds) of it.
        out: PNG (or any suffix matplotlib knows) to write; its folder is created.

    Returns:
        `out`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: see `band_of`.
        ConfigError: a suffix that matplotlib does not know.
    """
    bands = {label: band_of(curves, level=level, smooth=smooth) for label, curves in groups.items()}
    figure, axes = _figure(8.0, 4.8)
    for index, (label, band) in enumerate(bands.items()):
        colour = COLOURS[index % len(COLOURS)]
        runs = f"{band.num_runs} seeds" if band.num_runs > 1 else "1 seed"
        for curve in groups[label] if band.num_runs > 1 else ():
            axes.plot(curve.steps, _smoothed(curve.values, smooth), color=colour, alpha=0.22, linewidth=0.8)
        axes.fill_between(band.steps_G, band.low_G, band.high_G, color=colour, alpha=0.18, linewidth=0)
        dot = "o" if band.steps_G[0] == band.steps_G[-1] else ""  # a line of one point cannot be seen
        axes.plot(band.steps_G, band.mean_G, color=colour, linewidth=2.2, marker=dot, label=f"{label} ({runs})")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_formatter(_step_formatter())
    axes.margins(x=0.01)
    # By the runs, not the band: Student's interval of two seeds is twelve times as wide as the runs are apart.
    values = np.concatenate([_smoothed(curve.values, smooth) for curves in groups.values() for curve in curves])
    margin = 0.12 * (float(np.ptp(values)) or 1.0)
    axes.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    if any(band.num_runs > 1 for band in bands.values()):
        _note(axes, f"mean, {level:.0%} t-interval over seeds")
    widest = max(len(label) for label in bands)
    figure.legend(loc="outside lower left", frameon=False, ncols=max(1, min(len(bands), 96 // (widest + 18))))
    return _save(figure, axes, title, out)


def plot_intervals(scores: Mapping[str, Interval], out: Path, *, title: str = "", xlabel: str = "IQM") -> Path:
    """Draw one horizontal bar a label: the interval, with a tick at the estimate and its value beside it.

    Args:
        scores: label -> for example `stats.iqm_interval`.
        out: file to write; its folder is created.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: no scores.
    """
    if not scores:
        raise InputError("no scores to plot", field="scores")
    figure, axes = _figure(8.0, 1.4 + 0.5 * len(scores))
    for row, score in enumerate(scores.values()):
        colour = COLOURS[row % len(COLOURS)]
        low, high = (b if np.isfinite(b) else score.estimate for b in (score.low, score.high))
        axes.barh(row, high - low, left=low, height=0.5, color=colour, alpha=0.55, linewidth=0)
        axes.vlines(score.estimate, row - 0.25, row + 0.25, color=_INK, linewidth=2)
        place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(f"{score.estimate:,.1f}", (score.estimate, row - 0.25), **place, color=_INK, fontsize=9)
    axes.set_yticks(range(len(scores)), labels=list(scores))
    axes.set_ylim(len(scores) - 0.4, -0.75)
    axes.set_xlabel(xlabel, loc="right")  # beside long names the axis is shorter than its label
    axes.use_sticky_edges = False
    axes.margins(x=0.08)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_FAINT, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    return _save(figure, axes, title, out)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure_module: Any = require("matplotlib.figure", extra="plot")
    # A Figure of its own, without pyplot: no window system, no global state.
    figure = figure_module.Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return figure, axes


def _note(axes: Any, text: str) -> None:
    axes.set_title(text, loc="right", fontsize=8.5, color="#777777")


def _save(figure: Any, axes: Any, title: str, out: Path) -> Path:
    if title:
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    known = figure.canvas.get_supported_filetypes()
    if out.suffix.removeprefix(".") not in known:
        raise ConfigError(
            f"picture {out} has suffix {out.suffix!r}; expected one of {', '.join(f'.{k}' for k in known)}"
        )
    figure.savefig(out)
    return out


def _step_formatter() -> Any:
    ticker: Any = require("matplotlib.ticker", extra="plot")
    return ticker.FuncFormatter(lambda step, _: _step_text(step))


def _step_text(step: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(step) >= size:
            return f"{step / size:g}{unit}"
    return f"{step:g}"


def _smoothed(values: Sequence[float], width: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if width <= 1 or array.size < 2:
        return array
    width = min(width, array.size)
    kernel = np.ones(width)
    # Divided by the number of values under the kernel, so that the ends are means of what is there.
    return np.convolve(array, kernel, "same") / np.convolve(np.ones(array.size), kernel, "same")
