"""What a training run says to a person: a live display on a terminal, plain lines elsewhere, a curve at the end."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.live import Live

LIVE_PERIOD_S = 0.25
PLAIN_PERIOD_S = 2.0
# A drawing may take this share of the time; where it is slow it is done less often.
COST_SHARE = 0.001
_WINDOW = 12
_VALUE_WIDTH = 8

Columns = Sequence[str] | Mapping[str, Mapping[str, str]]
"""Metrics to show in this order, by the name they are logged under; or rows of them: title -> {name: what to call it}."""


class ProgressDisplay:
    """Steps, rate, time left and the newest metrics of one run; `update` may be called every iteration.

    Args:
        total_steps: at which the run ends.
        title: name of the run.
        start_step: step of the checkpoint a resumed run starts from.
        columns: what is shown; empty shows the first six metrics. A row of which nothing is known is left out.
        stream: stdout if None. Live if it is a terminal, else at most one line every two seconds and one at the end.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        title: str = "",
        *,
        start_step: int = 0,
        columns: Columns = (),
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total, self._title = total_steps, title
        self._rows = {"": {name: name for name in columns}} if not isinstance(columns, Mapping) else columns
        self._stream = stream or sys.stdout
        self._clock = clock
        self._live: Live | None = _make_live(self._stream) if self._stream.isatty() else None
        self._period = LIVE_PERIOD_S if self._live else PLAIN_PERIOD_S
        self._start_step = self._step = start_step
        self._metrics: dict[str, float] = {}
        self._start = clock()
        self._due = self._start + (0.0 if self._live else self._period)
        self._recent: deque[tuple[float, int]] = deque([(self._start, start_step)], maxlen=_WINDOW)
        self._closed = False
        self._costs: deque[float] = deque(maxlen=3)
        if self._live:
            self._live.start()
            # The first drawing imports and warms up what later ones find ready; the second tells their cost.
            self._draw(self._start)
            self._draw(self._start)

    def update(self, step: int, metrics: dict[str, float] | None = None) -> None:
        """Tell where the run stands. Metrics that are not given keep their last value."""
        self._step = step
        if metrics:
            self._metrics.update(metrics)
        now = self._clock()
        if now < self._due:
            return
        self._draw(now)
        self._due = now + max(self._period, min(self._costs) / COST_SHARE)

    def say(self, text: str) -> None:
        """A line that stays, above the display; from any thread."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def close(self) -> None:
        """Draw the final state, with the mean rate of the whole run."""
        if self._closed:
            return
        self._closed = True
        now = self._clock()
        self._recent.clear()
        self._recent.append((self._start, self._start_step))
        self._draw(now)
        if self._live:
            self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _draw(self, now: float) -> None:
        began = time.thread_time()
        self._recent.append((now, self._step))
        then, step = self._recent[0]
        rate = (self._step - step) / (now - then) if now > then else 0.0
        left = max(self._total - self._step, 0) / rate if rate > 0 else math.inf
        facts = [
            f"{self._step:,}/{self._total:,}",
            f"{number_text(rate)} steps/s",
            f"took {_clock_text(now - self._start)}" if self._closed else f"ETA {_clock_text(left)}",
        ]
        rows = self._rows if any(self._rows.values()) else {"": {name: name for name in tuple(self._metrics)[:6]}}
        known = [
            (title, [(label, number_text(self._metrics[name])) for name, label in row.items() if name in self._metrics])
            for title, row in rows.items()
        ]
        shown = [(title, cells) for title, cells in known if cells]
        share = min(max(self._step / self._total, 0.0), 1.0) if self._total else 1.0
        if self._live:
            width = self._live.console.width
            self._live.update(_live_lines(self._title, share, facts, shown, width), refresh=True)
        else:
            parts = [*facts, *(f"{label} {value}" for _, cells in shown for label, value in cells)]
            title = f"{self._title}: " if self._title else ""
            self._stream.write(f"{title}{share:4.0%} | {' | '.join(parts)}\n")
            self._stream.flush()
        # Processor time of this thread: what other processes take of a busy machine is no cost of drawing.
        self._costs.append(time.thread_time() - began)


def number_text(value: float) -> str:
    """A number in few characters.

    >>> [number_text(x) for x in (475.25, 0.01234, 3.1e-5, 123456.0, 0.0)]
    ['475.2', '0.0123', '3.1e-05', '123,456', '0']
    """
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if value == int(value) and size < 1e7:
        return f"{int(value):,}"
    if size >= 1e7 or size < 1e-3:
        return f"{value:.2g}"
    return f"{value:,.0f}" if size >= 1e4 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def print_curve(
    steps: Sequence[float],
    returns: Sequence[float],
    *,
    title: str = "episode return",
    width: int = 64,
    height: int = 12,
    stream: TextIO | None = None,
) -> None:
    """Print a learning curve in plain characters; see `curve_text`."""
    print(curve_text(steps, returns, title=title, width=width, height=height), file=stream or sys.stdout)


def curve_text(
    steps: Sequence[float],
    returns: Sequence[float],
    *,
    title: str = "episode return",
    width: int = 64,
    height: int = 12,
) -> str:
    """A learning curve as ASCII lines: each column is the mean of the values of its span of steps.

    Values that are not finite are left out. The result has `height` + 3 lines, or one line if there is nothing to draw.
    """
    points = [(float(x), float(y)) for x, y in zip(steps, returns, strict=True) if math.isfinite(y)]
    if not points:
        return f"{title}: no values"
    last = max(x for x, _ in points)
    first = min(x for x, _ in points)
    span = (last - first) or 1.0
    columns: list[list[float]] = [[] for _ in range(width)]
    for x, y in points:
        columns[min(int((x - first) / span * width), width - 1)].append(y)
    means = [sum(column) / len(column) if column else None for column in columns]
    low = min(mean for mean in means if mean is not None)
    high = max(mean for mean in means if mean is not None)
    scale = (high - low) or 1.0
    rows = [[" "] * width for _ in range(height)]
    for x_index, mean in enumerate(means):
        if mean is not None:
            rows[round((mean - low) / scale * (height - 1))][x_index] = "*"
    labels = [number_text(low + scale * index / (height - 1)) for index in range(height)]
    margin = max(len(label) for label in labels)
    # A label on every third row reads as a scale without crowding it.
    lines = [
        f"{labels[index] if index % 3 == 0 or index == height - 1 else '':>{margin}} |{''.join(rows[index]).rstrip()}"
        for index in reversed(range(height))
    ]
    left, right = f"{first:,.0f}", f"{last:,.0f} steps"
    axis = f"{'':>{margin}} +{'-' * width}"
    return "\n".join([title, *lines, axis, f"{'':>{margin}}  {left}{right:>{width - len(left)}}"])


def _make_live(stream: TextIO) -> Live:
    # Imported here: rich costs 90 ms, which a run that writes plain lines need not pay.
    from rich.console import Console
    from rich.live import Live

    return Live(console=Console(file=stream), auto_refresh=False, redirect_stderr=False)


def _live_lines(
    title: str, share: float, facts: list[str], rows: list[tuple[str, list[tuple[str, str]]]], width: int
) -> Any:
    from rich.segment import Segment, Segments
    from rich.style import Style

    # Segments by hand: a table of the same content takes 2.5 ms to lay out, styled text 1.1, these 0.4.
    bold, faint, done = (Style.parse(word) for word in ("bold", "bright_black", "green" if share >= 1 else "cyan"))
    tail = f" {share:4.0%}  {'  '.join(facts)}"
    # A line that the terminal breaks is one more than the display takes back.
    bar = max(min(30, width - len(title) - len(tail) - 2), 0)
    num_full = round(share * bar)
    segments = [
        Segment(f"{title} " if title else "", bold),
        Segment("━" * num_full, done),
        Segment("━" * (bar - num_full), faint),
        Segment(tail, bold),
    ]
    margin = max((len(name) + 2 if name else 0 for name, _ in rows), default=0)
    for name, cells in rows:
        segments += [Segment.line(), Segment(f"{name:<{margin}}", faint)]
        at = margin
        for label, value in cells:
            # Cells keep their width while numbers change; the next one starts a line where it would be broken.
            cell = len(label) + 1 + max(_VALUE_WIDTH, len(value))
            if at + cell > width and at > margin:
                segments += [Segment.line(), Segment(" " * margin)]
                at = margin
            segments += [Segment(f"{label} ", faint), Segment(f"{value:<{cell - len(label) - 1}}", bold), Segment("  ")]
            at += cell + 2
    return Segments(segments)


def _clock_text(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
