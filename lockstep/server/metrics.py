"""Counters and histograms in Prometheus' text format (exposition format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """Counts of values up to each bound.

    >>> h = Histogram((1, 2))
    >>> h.add(2)
    >>> h.counts
    [0, 1, 0]
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        """Cumulative buckets, sum and count; `labels` are written ones without braces."""
        total, lines = 0, []
        comma = "," if labels else ""
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels}{comma}le="{bound}"}} {total}')
        braces = f"{{{labels}}}" if labels else ""
        return [*lines, f"{name}_sum{braces} {self.sum}", f"{name}_count{braces} {total}"]


class RequestMetrics:
    """Requests by route and status, and their latency by route."""

    def __init__(self, bounds: Sequence[float] = LATENCY_BUCKETS_S) -> None:
        self.bounds = bounds
        self.counts: dict[tuple[str, int], int] = {}
        self.latencies: dict[str, Histogram] = {}

    def observe(self, route: str, status: int, seconds: float) -> None:
        """One finished request."""
        key = (route, status)
        self.counts[key] = self.counts.get(key, 0) + 1
        histogram = self.latencies.get(route)
        if histogram is None:
            histogram = self.latencies[route] = Histogram(self.bounds)
        histogram.add(seconds)

    def lines(self) -> list[str]:
        """This part of the exposition."""
        name = "lockstep_requests_total"
        lines = header(name, "counter", "HTTP requests by route and status")
        lines += [sample(name, n, route=route, status=str(status)) for (route, status), n in self.counts.items()]
        name = "lockstep_request_seconds"
        lines += header(name, "histogram", "Seconds from a request's headers to its reply")
        for route, histogram in self.latencies.items():
            lines += histogram.lines(name, label_text(route=route))
        return lines


def header(name: str, kind: str, text: str) -> list[str]:
    """HELP and TYPE lines."""
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def sample(name: str, value: float, **labels: str) -> str:
    """One line.

    >>> sample("up", 1, policy="a")
    'up{policy="a"} 1'
    """
    return f"{name}{{{label_text(**labels)}}} {value}" if labels else f"{name} {value}"


def label_text(**labels: str) -> str:
    """Labels with quotes, backslashes and line ends escaped."""
    escaped = {k: v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for k, v in labels.items()}
    return ",".join(f'{key}="{value}"' for key, value in escaped.items())


def family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    """A metric with one sample per policy."""
    return [*header(name, kind, text), *(sample(name, value, policy=policy) for policy, value in samples)]
