"""`lockstep runs list|show|compare|plot`: look at run directories; nothing is changed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lockstep.cli.run_samples import Pick, print_samples
from lockstep.core.env import runs_root
from lockstep.core.errors import CheckpointError, ConfigError
from lockstep.runs.console import curve_text, number_text
from lockstep.runs.directory import METRICS, SAMPLES, RunState
from lockstep.runs.grouping import RunGroup, differing, flatten, group_runs
from lockstep.runs.jsonl import last_record
from lockstep.runs.plot import Curve, plot_curves, plot_intervals
from lockstep.runs.record import DamagedRun, EvalRecord, RunRecord, find_run, list_run_folders, read_run
from lockstep.runs.stats import Interval, mean_interval, probability_of_improvement

_STATE_STYLES = {
    RunState.RUNNING: "cyan",
    RunState.FINISHED: "green",
    RunState.FAILED: "red",
    RunState.KILLED: "yellow",
}


@dataclass(frozen=True)
class ListRuns:
    """List all runs: status, steps, last evaluation with its 95% interval over episodes, time and rate."""

    folder: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder that holds the runs (default: --root)."""
    root: Path = field(default_factory=runs_root)
    """The same, as the other commands name it."""


@dataclass(frozen=True)
class ShowRun:
    """Show one run: status, versions, config, evaluations, newest metrics and the learning curve; or its samples."""

    run: Annotated[str, tyro.conf.Positional]
    """Path, name, or beginning of a name."""
    root: Path = field(default_factory=runs_root)
    """Folder that holds the runs."""
    samples: bool = False
    """What a language model wrote: prompt, text, reward, advantage, largest mismatch of its log-probabilities, the
    versions of weights that wrote it, tokens (with a + where they were cut off)."""
    pick: Pick = "newest"
    """Which samples."""
    step: int | None = None
    """Only those of this step."""
    num: int = 8
    """How many of them."""


@dataclass(frozen=True)
class CompareRuns:
    """Compare runs: settings that differ, and scores over seeds (IQM with a 95% bootstrap interval)."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Paths, names or beginnings of names; runs that differ only in the seed form a group."""
    root: Path = field(default_factory=runs_root)
    """Folder that holds the runs."""
    plot: Path | None = None
    """Also draw the scores to this PNG."""


@dataclass(frozen=True)
class PlotRuns:
    """Draw learning curves to a PNG: the mean over seeds of each group, with a 95% interval."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Paths, names or beginnings of names; runs that differ only in the seed form a group."""
    out: Path = Path("curve.png")
    """File to write."""
    metric: str = "return"
    """Name of a metric in metrics.jsonl, or "eval" for the evaluations."""
    smooth: int = 1
    """Width of a moving average (points)."""
    title: str = ""
    """Title (default: the environment, if all runs share it)."""
    root: Path = field(default_factory=runs_root)
    """Folder that holds the runs."""


def main(args: Sequence[str]) -> int:
    verbs: dict[str, Callable[..., Any]] = {"list": ListRuns, "show": ShowRun, "compare": CompareRuns, "plot": PlotRuns}
    wish = tyro.extras.subcommand_cli_from_dict(verbs, args=list(args), prog="lockstep runs")
    match wish:
        case ListRuns():
            return list_runs(wish)
        case ShowRun():
            return show_run(wish)
        case CompareRuns():
            return compare_runs(wish)
        case _:
            return plot_runs(wish)


def list_runs(args: ListRuns) -> int:
    """Print the table of runs; a folder that cannot be read is a row, and below the table is why."""
    table = _table("run", "recipe", "env", "seed>", "status", "steps>", "eval return [95% CI]>", "wall>", "steps/s>")
    root = args.root if args.folder is None else args.folder
    found = list_run_folders(root)
    for run in found:
        if isinstance(run, DamagedRun):
            table.add_row(escape(run.path.name), *["-"] * 3, "[red]damaged[/]", *["-"] * 4)
            continue
        evaluation = run.last_evaluation()
        score = str(_episode_interval(evaluation)) if evaluation else "-"
        wall = _duration(run.status.wall_seconds)
        cells = [run.name, run.recipe, run.env_id, str(run.seed), f"[{_STATE_STYLES[run.state]}]{run.state}[/]"]
        table.add_row(*map(_cell, cells), f"{run.num_steps:,}", escape(score), wall, _rate(run))
    console = _console()
    console.print(table if found else f"no runs in {root}")
    for run in found:
        if isinstance(run, DamagedRun):
            console.print(f"damaged: {run.reason}", markup=False)
    return 0


def show_run(args: ShowRun) -> int:
    """Print everything a run directory says."""
    run = read_run(find_run(args.root, args.run))
    console = _console()
    if args.samples:
        if args.num < 1:
            raise ConfigError(f"num={args.num}; expected 1 or more")
        print_samples(run.path / SAMPLES, console, args.pick, args.step, args.num)
        return 0
    console.print(f"[bold]{escape(run.name)}[/]  {escape(str(run.path))}")
    facts = _table("", "", header=False)
    facts.add_row("status", f"[{_STATE_STYLES[run.state]}]{run.state}[/] {escape(run.status.error)}".rstrip())
    facts.add_row("recipe", f"{escape(run.recipe)}, seed {run.seed}")
    facts.add_row("started", f"{run.status.started} on {run.status.host}, process {run.status.pid}")
    facts.add_row("stopped", run.status.stopped or "-")
    resumes = f", resumed {run.status.num_resumes}x" if run.status.num_resumes else ""
    facts.add_row("wall time", f"{_duration(run.status.wall_seconds)}{resumes}")
    facts.add_row("steps", f"{run.num_steps:,} at {_rate(run)} steps/s")
    console.print(facts)
    _print_pairs(console, "versions", run.versions())
    settings = {name: value for name, value in flatten(run.config).items() if name.split(".")[-1] != "class"}
    _print_pairs(console, "config", settings)
    _print_evaluations(console, run.evaluations())
    for step, text in run.events():
        console.print(f"step {step:,}: {text}", markup=False, highlight=False)
    last = last_record(run.path / METRICS)
    if last:
        _print_pairs(console, "newest metrics", last)
        for metric, title in (("return", "episode return"), ("reward", "mean reward")):
            if metric in run.metric_names():
                console.print(curve_text(*run.series(metric), title=title), markup=False, highlight=False)
    return 0


def compare_runs(args: CompareRuns) -> int:
    """Print what differs between groups of runs, in settings and in scores."""
    groups = group_runs(_named_runs(args.root, args.runs))
    console = _console()
    if len(groups) > 1:
        table = _table("setting", *(group.label for group in groups), title="settings that differ")
        for name in differing([group.settings for group in groups]):
            table.add_row(*map(_cell, [escape(name), *(escape(str(g.settings.get(name, "-"))) for g in groups)]))
        console.print(table)
    table = _table("env", "group", "runs>", "IQM [95% CI]>", "mean>", "min>", "max>", "P(beats first)>", title="scores")
    rivals: dict[str, RunGroup] = {}
    for group in sorted(groups, key=lambda group: group.env_id):
        scores, interval = group.scores(), group.interval()
        if interval is None:
            table.add_row(group.env_id, _cell(escape(group.label)), str(len(group.runs)), "no evaluation", *["-"] * 4)
            continue
        first = rivals.setdefault(group.env_id, group)
        better = "-" if first is group else _probability(probability_of_improvement([scores], [first.scores()]))
        spread = [number_text(value) for value in (sum(scores) / len(scores), min(scores), max(scores))]
        num_runs = str(len(scores)) if len(scores) == len(group.runs) else f"{len(scores)} of {len(group.runs)}"
        table.add_row(group.env_id, _cell(escape(group.label)), num_runs, _cell(escape(str(interval))), *spread, better)
    console.print(table)
    console.print("[bright_black]score of a run: mean return of its last evaluation; intervals are over runs[/]")
    if args.plot is not None:
        intervals = {group.label: interval for group in groups if (interval := group.interval()) is not None}
        plot_intervals(intervals, args.plot, xlabel="IQM of evaluation return, 95% bootstrap interval over seeds")
        console.print(f"wrote {args.plot}", markup=False)
    return 0


def plot_runs(args: PlotRuns) -> int:
    """Draw learning curves; a run without values is left out, saying so."""
    runs = _named_runs(args.root, args.runs)
    environments = {run.env_id for run in runs}
    several = len(environments) > 1
    curves: dict[str, list[Curve]] = {}
    for group in group_runs(runs):
        named = several and group.env_id not in group.label
        label = f"{group.label} on {group.env_id}" if named else group.label
        for run in group.runs:
            curve = _curve(run, args.metric)
            if curve.steps:
                curves.setdefault(label, []).append(curve)
            else:
                print(f"{run.name} has no {args.metric!r} yet; left out", file=sys.stderr)
    if not curves:
        raise CheckpointError(f"none of the {len(runs)} runs has a value of {args.metric!r}; choose another --metric")
    title = args.title or ("" if several else environments.pop())
    ylabel = {"return": "episode return", "eval": "evaluation return"}.get(args.metric, args.metric)
    plot_curves(curves, args.out, title=title, ylabel=ylabel, smooth=args.smooth)
    _console().print(f"wrote {args.out}", markup=False)
    return 0


def _named_runs(root: Path, names: Sequence[str]) -> list[RunRecord]:
    if not names:
        raise ConfigError("no run named; give paths, names or beginnings of names (lockstep runs list shows them)")
    return [read_run(path) for path in dict.fromkeys(find_run(root, name) for name in names)]


def _curve(run: RunRecord, metric: str) -> Curve:
    if metric == "eval":
        means = {e.step: e.mean for e in run.evaluations() if math.isfinite(e.mean)}
        return Curve(list(means), list(means.values()))
    return Curve(*run.series(metric))


def _print_pairs(console: Console, title: str, pairs: dict[str, Any]) -> None:
    table = _table("", "", header=False, title=title)
    for name, value in pairs.items():
        text = number_text(value) if isinstance(value, float) else str(value)
        table.add_row(escape(name), _cell(escape(text)))
    console.print(table)


def _print_evaluations(console: Console, evaluations: list[EvalRecord]) -> None:
    if not evaluations:
        return
    table = _table("step>", "episodes>", "return [95% CI]>", title="evaluations")
    for evaluation in evaluations[-10:]:
        interval = _cell(escape(str(_episode_interval(evaluation))))
        table.add_row(f"{evaluation.step:,}", str(len(evaluation.returns)), interval)
    console.print(table)


def _episode_interval(evaluation: EvalRecord) -> Interval:
    returns = [value for value in evaluation.returns if math.isfinite(value)]
    return mean_interval(returns) if returns else Interval(math.nan, math.nan, math.nan)


def _rate(run: RunRecord) -> str:
    last = last_record(run.path / METRICS)
    if not last:
        return "-"
    # Time spent training if the loop logs it: evaluations are no part of the rate.
    seconds = last.get("train_s") or last.get("wall_s") or 0.0
    return f"{last['step'] / seconds:,.0f}" if seconds > 0 else "-"


def _probability(interval: Interval) -> str:
    return escape(f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _cell(text: str) -> str:
    return text or "-"


def _table(*columns: str, header: bool = True, title: str = "") -> Table:
    """A plain table; a column whose name ends in `>` is right-aligned."""
    table = Table(box=None, show_header=header, title=title or None, title_justify="left", title_style="bold")
    table.padding = (0, 2, 0, 0)
    for name in columns:
        justify: Any = "right" if name.endswith(">") else "left"
        table.add_column(escape(name.removesuffix(">")), justify=justify, overflow="fold", header_style="bright_black")
    return table


def _console() -> Console:
    # A pipe has no width; wide enough for every table keeps one run on one line.
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)
