"""`GET /metrics`: everything the server counts, in Prometheus' text format."""

from __future__ import annotations

from lockstep.server.metrics import RequestMetrics, family, header, label_text, sample
from lockstep.server.repository import Repository


def exposition(repository: Repository, metrics: RequestMetrics) -> str:
    """The whole page."""
    served = list(repository.policies.items())
    lines = metrics.lines()
    name = "lockstep_batch_rows"
    lines += header(name, "histogram", "Rows in a batch")
    for policy, entry in served:
        lines += entry.batcher.stats.batch_rows.lines(name, label_text(policy=policy))
    gauges: dict[str, tuple[str, list[tuple[str, float]]]] = {
        "lockstep_queue_depth": ("Requests that wait", [(n, len(s.batcher)) for n, s in served]),
        "lockstep_sessions": ("Sessions kept", [(n, len(s.sessions)) for n, s in served]),
        "lockstep_policy_ready": ("1 if loaded", [(n, int(s.ready)) for n, s in served]),
    }
    for name, (text, samples) in gauges.items():
        lines += family(name, "gauge", text, samples)
    counters: dict[str, tuple[str, list[tuple[str, float]]]] = {
        "lockstep_rows_total": ("Rows decided", [(n, s.batcher.stats.num_rows) for n, s in served]),
        "lockstep_policy_seconds_total": (
            "Seconds in the policy",
            [(n, s.batcher.stats.run_ns / 1e9) for n, s in served],
        ),
        "lockstep_reloads_total": ("Versions that took over", [(n, s.num_reloads) for n, s in served]),
        "lockstep_reload_failures_total": ("Loads that failed", [(n, s.num_failed_reloads) for n, s in served]),
    }
    for name, (text, samples) in counters.items():
        lines += family(name, "counter", text, samples)
    name = "lockstep_policy_info"
    lines += header(name, "gauge", "Version and digest that are served")
    lines += [sample(name, 1, policy=n, version=s.loaded.version, digest=s.loaded.digest) for n, s in served]
    return "\n".join(lines) + "\n"
