"""Runs that differ only in their seed belong together; groups are what tables and plots compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.runs.record import RunRecord
from lockstep.runs.stats import Interval, iqm_interval


@dataclass(frozen=True)
class RunGroup:
    """Runs of one environment and config, all but the seed equal. `label` tells it from the others."""

    label: str
    env_id: str
    settings: dict[str, Any]
    runs: tuple[RunRecord, ...]

    def scores(self) -> list[float]:
        """Mean return of the last evaluation of each run that has one."""
        evaluations = [run.last_evaluation() for run in self.runs]
        return [evaluation.mean for evaluation in evaluations if evaluation is not None]

    def interval(self) -> Interval | None:
        """IQM of the scores with a bootstrap interval over seeds; None without scores."""
        scores = self.scores()
        return iqm_interval([scores]) if scores else None


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted names; lists stay values.

    >>> flatten({"lr": 0.1, "env": {"id": "CartPole-v1"}})
    {'lr': 0.1, 'env.id': 'CartPole-v1'}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and list(value) == ["float"]:
            flat[f"{prefix}{key}"] = float(value["float"])  # as config_json writes what JSON lacks
        elif isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def group_runs(runs: Iterable[RunRecord]) -> list[RunGroup]:
    """Group runs by recipe and config without seeds, in order of first appearance.

    A label is the recipe; where groups share it, also the settings in which they differ.
    """
    grouped: dict[str, tuple[dict[str, Any], list[RunRecord]]] = {}
    for run in runs:
        settings = {key: value for key, value in flatten(run.config).items() if key.split(".")[-1] != "seed"}
        grouped.setdefault(repr((run.recipe, sorted(settings.items()))), (settings, []))[1].append(run)
    groups = list(grouped.values())
    return [
        RunGroup(_label(settings, members[0], groups), members[0].env_id, settings, tuple(members))
        for settings, members in groups
    ]


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names whose values are not the same in all of `settings`, in order of appearance."""
    names = dict.fromkeys(name for one in settings for name in one)
    # A sentinel of its own: a missing name differs from one that is None.
    missing = object()
    return [name for name in names if any(one.get(name, missing) != settings[0].get(name, missing) for one in settings)]


def _label(settings: dict[str, Any], run: RunRecord, groups: list[tuple[dict[str, Any], list[RunRecord]]]) -> str:
    rivals = [other for other, members in groups if members[0].recipe == run.recipe]
    names = differing(rivals)
    shown = [f"{name.split('.')[-1] if name != 'env.id' else 'env'}={settings.get(name)}" for name in names[:3]]
    more = f" +{len(names) - 3}" if len(names) > 3 else ""
    return " ".join([run.recipe, *shown]) + more
