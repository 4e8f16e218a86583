"""Curves and bars: the numbers behind the picture, and a picture that is there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lockstep.core.errors import ConfigError, InputError
from lockstep.runs.plot import Curve, band_of, plot_curves, plot_intervals
from lockstep.runs.stats import Interval, t_interval

pytest.importorskip("matplotlib")


def test_band_is_the_t_interval_at_every_step() -> None:
    band = band_of([Curve([0, 100], [0.0, 10.0]), Curve([0, 50, 100], [2.0, 7.0, 12.0]), Curve([0, 100], [1.0, 11.0])])
    assert (band.steps_G[0], band.steps_G[-1], band.num_runs) == (0, 100, 3)
    middle = t_interval([10.0, 12.0, 11.0])
    assert (band.mean_G[-1], band.low_G[-1], band.high_G[-1]) == pytest.approx(
        (middle.estimate, middle.low, middle.high)
    )


def test_runs_of_different_grids_meet_where_all_have_values() -> None:
    band = band_of([Curve([0, 10, 20], [0.0, 10.0, 20.0]), Curve([5, 40], [5.0, 40.0])])
    assert (band.steps_G[0], band.steps_G[-1]) == (5, 20)
    np.testing.assert_allclose(band.mean_G, band.steps_G)
    np.testing.assert_allclose(band.high_G, band.low_G)


def test_single_run_has_no_band() -> None:
    band = band_of([Curve([0, 1], [1.0, 2.0])])
    assert np.isnan(band.low_G).all()


def test_smoothing_keeps_constants_and_ends() -> None:
    band = band_of([Curve(range(9), [3.0] * 9)], smooth=5)
    np.testing.assert_allclose(band.mean_G, 3.0)
    ends = band_of([Curve(range(3), [0.0, 3.0, 6.0])], smooth=3)
    assert (ends.mean_G[0], ends.mean_G[-1]) == (1.5, 4.5)


def test_curves_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without values"):
        band_of([Curve([], [])])
    with pytest.raises(InputError, match="do not overlap"):
        band_of([Curve([0, 1], [1.0, 1.0]), Curve([5, 6], [1.0, 1.0])])
    with pytest.raises(InputError, match="no scores"):
        plot_intervals({}, Path("x.png"))
    with pytest.raises(ConfigError, match=r"'\.foo'; expected one of .*\.png"):
        plot_curves({"a": [Curve([0, 1], [1.0, 1.0])]}, tmp_path / "x.foo")


def test_pictures_are_written(tmp_path: Path) -> None:
    groups = {"one": [Curve([0, 10], [0.0, 1.0])], "two": [Curve([0, 10], [0.0, 2.0]), Curve([0, 10], [1.0, 3.0])]}
    scores = {"one": Interval(1.0, 0.5, 1.5), "single": Interval(2.0, math.nan, math.nan)}
    for out in (
        plot_curves(groups, tmp_path / "deep" / "curve.png", title="CartPole-v1"),
        plot_intervals(scores, tmp_path / "bars.png"),
    ):
        assert out.read_bytes().startswith(b"\x89PNG")
        assert out.stat().st_size > 5000
