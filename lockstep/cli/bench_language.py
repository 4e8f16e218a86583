"""`lockstep bench language`: recipes of language models over seeds: held-out scores before and after, and their curves.

A recipe may be varied: `grpo-spell-backward+learn.exact=false` is the same with one field of another value.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from lockstep.api import override, train
from lockstep.cli.figures import begin_figures, write_figures
from lockstep.core.errors import ConfigError
from lockstep.learn.session import Result
from lockstep.recipes import recipe
from lockstep.rl.lm.grpo import GRPOConfig
from lockstep.runs.plot import Curve, plot_curves
from lockstep.runs.record import read_run
from lockstep.runs.stats import t_interval


@dataclass(frozen=True)
class LanguageBenchArgs:
    """Train language models over seeds and draw how held-out problems are answered."""

    recipes: tuple[str, ...] = (
        "grpo-spell-backward",
        "grpo-chain-sum",
        "grpo-letter-counting",
        "grpo-spell-backward+learn.exact=false",
        "int8-spell-backward",
    )
    """Recipes, each with `+field=value` for what differs."""
    seeds: int = 5
    """Seeds of each (1, 2, ...)."""
    updates: int = 0
    """Updates, for a shorter look (0: the recipe's own)."""
    out: Path = Path("runs")
    """Folder of the run directories."""
    json: Path | None = None
    """Also write the figures to this file, after every training; a file of the same commit is completed."""
    plot: Path | None = None
    """Also draw the curves of held-out scores (needs the plot extra)."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(LanguageBenchArgs, args=list(args), prog="lockstep bench language")
    if wish.seeds < 1 or wish.updates < 0:
        raise ConfigError(f"seeds={wish.seeds}, updates={wish.updates}; expected 1 or more, 0 or more")
    configs = {name: varied(name) for name in wish.recipes}
    console = Console(width=None if sys.stdout.isatty() else 160)
    figures = begin_figures(wish.json, "runs")
    for seed in range(1, wish.seeds + 1):
        for name, config in configs.items():
            runs = figures["runs"].setdefault(name, [])
            if seed in {run["seed"] for run in runs}:
                continue
            run = train_one(name, config, seed, wish)
            runs.append(run)
            write_figures(wish.json, figures)
            console.print(
                f"{name} seed {seed}: {run['scores'][0]:.3f} -> {run['scores'][-1]:.3f}, {run['seconds']:.0f} s"
            )
    chosen = {name: figures["runs"][name] for name in configs}
    console.print(table(chosen))
    if wish.plot is not None:
        curves = {name: [Curve(run["steps"], run["scores"]) for run in runs] for name, runs in chosen.items()}
        print(plot_curves(curves, wish.plot, ylabel="held-out score", xlabel="updates"))
    return 0


def varied(name: str) -> GRPOConfig:
    """The config of `recipe+field=value+...`; values are JSON, or else text.

    Raises:
        ConfigError: no such recipe or field, or a recipe that is not of this loop.
    """
    base, *changes = name.split("+")
    config: Any = recipe(base)
    if not isinstance(config, GRPOConfig):
        raise ConfigError(f"recipe {base!r} is no reinforcement of a language model; see `lockstep train --list`")
    for change in changes:
        field, found, value = change.partition("=")
        if not found:
            raise ConfigError(f"{name!r}: {change!r} is not of the form field=value")
        try:
            config = override(config, field, json.loads(value))
        except ValueError:
            config = override(config, field, value)
    return config


def train_one(name: str, config: GRPOConfig, seed: int, wish: LanguageBenchArgs) -> dict[str, Any]:
    """Train one seed; held-out scores by update."""
    changes: dict[str, Any] = {"run__seed": seed, "run__tensorboard": False}
    if wish.updates:
        changes["run__total_steps"] = wish.updates
    run = train(
        config, out=wish.out, name=f"{re.sub('[+=]', '-', name)}-s{seed}", recipe_name=name.split("+")[0], **changes
    )
    result = run.result
    assert isinstance(result, Result)
    assert result.first is not None
    assert result.last is not None
    evaluations = read_run(run.path).evaluations()
    return {
        "seed": seed,
        "seconds": result.train_seconds,
        "steps": [one.step for one in evaluations],
        "scores": [one.mean for one in evaluations],
        "greedy": [result.first.extra.get("greedy"), result.last.extra.get("greedy")],
    }


def table(figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Means over seeds with Student's 95% intervals; the gain's least and greatest."""
    made = Table(title="held-out score before and after reinforcement: mean over seeds [95% interval]")
    for heading in (
        "recipe",
        "seeds",
        "before",
        "after",
        "gain, least to greatest",
        "most probable answers",
        "seconds",
    ):
        made.add_column(heading)
    for name, runs in figures.items():
        before, after = ([run["scores"][place] for run in runs] for place in (0, -1))
        gains = sorted(last - first for first, last in zip(before, after, strict=True))
        greedy = (
            [statistics.fmean(run["greedy"][i] for run in runs) for i in (0, 1)]
            if runs[0]["greedy"][0] is not None
            else None
        )
        made.add_row(
            name,
            str(len(runs)),
            str(t_interval(before)),
            str(t_interval(after)),
            f"{statistics.median(gains):+.3f}, {gains[0]:+.3f} to {gains[-1]:+.3f}",
            f"{greedy[0]:.3f} -> {greedy[1]:.3f}" if greedy else "-",
            f"{statistics.median(run['seconds'] for run in runs):.0f}",
        )
    return made
