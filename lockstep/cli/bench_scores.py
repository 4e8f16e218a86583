"""`lockstep bench scores`: returns over seeds beside published figures, and wall-clock to solve."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from lockstep.cli.figures import begin_figures, write_figures
from lockstep.core.errors import ConfigError, unknown_name
from lockstep.recipes import recipe
from lockstep.rl.algorithms import train_function
from lockstep.rl.session import Session
from lockstep.runs.stats import iqm, iqm_interval, t_interval


@dataclass(frozen=True)
class Published:
    """A figure of another project: mean return after `steps`, one training run each."""

    mean: float
    std: float
    steps: str
    source: str


RL_ZOO = "RL-Zoo benchmark.md, PPO, one seed"

# recipe -> published figure on the nearest version of the environment
SCORES: dict[str, Published | None] = {
    "ppo-cartpole-zoo": Published(500.0, 0.0, "100k", RL_ZOO),
    "ppo-acrobot": Published(-73.506, 18.201, "1M", RL_ZOO),
    "ppo-pendulum": Published(-172.225, 104.159, "100k", RL_ZOO),
    "ppo-lunarlander-zoo": Published(242.119, 31.823, "1M", RL_ZOO + ", LunarLander-v2"),
    "ppo-halfcheetah-zoo": Published(5819.099, 663.530, "1M", RL_ZOO + ", HalfCheetah-v3"),
    "ppo-hopper": Published(2410.435, 10.026, "1M", RL_ZOO + ", Hopper-v3, with its own settings"),
    "sac-pendulum": Published(-156.995, 88.714, "20k", "RL-Zoo benchmark.md, SAC, one seed"),
    "sac-pendulum-bf16": Published(-156.995, 88.714, "20k", "RL-Zoo benchmark.md, SAC, one seed"),
    "ppo-minatar-breakout": None,
}
# Scored when asked for by name.
MORE_SCORES: dict[str, Published | None] = {
    "ppo-hopper-zoo": Published(2410.435, 10.026, "1M", RL_ZOO + ", Hopper-v3"),
    "a2c-cartpole": Published(500.0, 0.0, "500k", "RL-Zoo benchmark.md, A2C, one seed"),
    "a2c-pendulum": Published(-162.965, 103.210, "1M", "RL-Zoo benchmark.md, A2C, one seed"),
    "dqn-cartpole": Published(500.0, 0.0, "50k", "RL-Zoo benchmark.md, DQN, one seed"),
    "dqn-lunarlander": Published(154.382, 79.241, "100k", "RL-Zoo benchmark.md, DQN, one seed, LunarLander-v2"),
    "qrdqn-cartpole": Published(500.0, 0.0, "50k", "RL-Zoo benchmark.md, QR-DQN, one seed"),
    "td3-pendulum": Published(-151.855, 90.227, "20k", "RL-Zoo benchmark.md, TD3, one seed"),
    "ddpg-pendulum": Published(-152.099, 94.282, "20k", "RL-Zoo benchmark.md, DDPG, one seed"),
}

# recipe -> (return that counts as solved, training seconds wanted as the median of the seeds)
SOLVE: dict[str, tuple[float, float]] = {
    "ppo-cartpole": (475.0, 1.0),
    "ppo-lunarlander": (200.0, 40.0),
}


@dataclass(frozen=True)
class ScoreBenchArgs:
    """Train recipes over seeds and compare."""

    recipes: tuple[str, ...] = tuple(SCORES)
    """Recipes to score."""
    solve: tuple[str, ...] = tuple(SOLVE)
    """Recipes whose wall-clock to solve is measured."""
    seeds: int = 5
    """Seeds of each recipe (1, 2, ...)."""
    episodes: int = 100
    """Episodes of the final evaluation."""
    total_steps: int = 0
    """Environment steps, for a shorter look (0: the recipe's own)."""
    jobs: int = 1
    """Trainings of the score table at a time; solving is always timed alone."""
    json: Path | None = None
    """Also write the figures to this file, after every training; a file of the same commit is completed."""
    show: Path | None = None
    """Print the tables of a written file, of any commit, and train nothing."""


def main(args: Sequence[str]) -> int:
    if args and args[0] == "--one":
        print(json.dumps(train_one(*args[1:])))
        return 0
    wish = tyro.cli(ScoreBenchArgs, args=list(args), prog="lockstep bench scores")
    if wish.show is not None:
        return show(wish.show)
    for name in (*wish.recipes, *wish.solve):
        recipe(name)
    for name in wish.solve:
        if name not in SOLVE:
            raise ConfigError(unknown_name("recipe with a solving threshold", name, SOLVE))
    console = _console()
    figures = begin_figures(wish.json, "scores", "solve")
    for kind, names in (("solve", wish.solve), ("scores", wish.recipes)):
        for name in names:
            runs = figures[kind].setdefault(name, [])
            todo = [seed for seed in range(1, wish.seeds + 1) if seed not in {run["seed"] for run in runs}]
            jobs = wish.jobs if kind == "scores" else 1
            with ThreadPoolExecutor(jobs) as pool:
                for run in pool.map(lambda seed, n=name, k=kind: _child(n, seed, wish, solve=k == "solve"), todo):
                    runs.append(run)
                    write_figures(wish.json, figures)
                    console.print(
                        f"{kind} {name} seed {run['seed']}: return {run['mean']:.1f}, {run['train_seconds']:.2f} s"
                    )
    if wish.solve:
        console.print(solve_table({name: figures["solve"][name] for name in wish.solve}))
    if wish.recipes:
        console.print(score_table({name: figures["scores"][name] for name in wish.recipes}))
    return 0


def show(path: Path) -> int:
    """Print the tables of a file that `--json` wrote.

    Raises:
        ConfigError: no such file, or not one of these.
    """
    try:
        figures = json.loads(path.read_text())
        solve, scores = ({name: runs for name, runs in figures[kind].items() if runs} for kind in ("solve", "scores"))
        tables = [solve_table(solve), score_table(scores)]
        commit = figures["versions"]["commit"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read as figures of `lockstep bench scores --json`: {error!r}; name a file that it wrote"
        ) from error
    console = _console()
    for table in tables:
        if table.row_count:
            console.print(table)
    console.print(f"measured at commit {commit}", markup=False, highlight=False)
    return 0


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200)


def train_one(name: str, seed: str, episodes: str, total_steps: str, solve: str) -> dict[str, Any]:
    """Train one seed in this process; the figures of its final evaluation."""
    config = recipe(name)
    changes: dict[str, Any] = {"seed": int(seed), "final_episodes": int(episodes), "tensorboard": False}
    if int(total_steps):
        changes["total_steps"] = int(total_steps)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))
    session = Session(config.run, config.env)
    start = time.perf_counter()
    result = train_function(type(config).__name__)[1](config, session)
    assert result.evaluation is not None
    return {
        "seed": int(seed),
        "mean": result.evaluation.mean,
        "std": result.evaluation.std,
        "steps": result.steps,
        "train_seconds": result.train_seconds,
        "wall_seconds": time.perf_counter() - start,
        "solve": int(solve),
    }


def _child(name: str, seed: int, wish: ScoreBenchArgs, *, solve: bool) -> dict[str, Any]:
    arguments = ["--one", name, str(seed), str(wish.episodes), str(wish.total_steps), str(int(solve))]
    command = [sys.executable, "-m", "lockstep.cli.main", "bench", "scores", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * 3600)
    if done.returncode != 0:
        raise ConfigError(f"training {name} with seed {seed} failed: {done.stderr.strip()[-1500:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def solve_table(figures: dict[str, list[dict[str, Any]]]) -> Table:
    """Training seconds until the recipe's stopping rule, and whether the policy then passes."""
    out = Table(title="wall-clock to solve (training seconds: collecting and learning)")
    for column in ("recipe", "solved", "steps", "min s", "median s", "max s", "target"):
        out.add_column(column, justify="left" if column == "recipe" else "right")
    for name, runs in figures.items():
        threshold, want = SOLVE.get(name, (math.nan, math.nan))  # a file may be of an older list
        seconds = [run["train_seconds"] for run in runs]
        solved = sum(run["mean"] >= threshold for run in runs)
        steps = f"{statistics.median(run['steps'] for run in runs):,.0f}"
        times = [f"{value:.2f}" for value in (min(seconds), statistics.median(seconds), max(seconds))]
        judged = (f"{solved}/{len(runs)} >= {threshold:g}", f"median < {want:g} s") if name in SOLVE else ("-", "-")
        out.add_row(name, judged[0], steps, *times, judged[1])
    return out


def score_table(figures: dict[str, list[dict[str, Any]]]) -> Table:
    """Mean, IQM and their intervals over seeds, beside the published mean."""
    out = Table(title="mean return of the final policy over seeds (each seed: mean over its evaluation episodes)")
    for column in ("recipe", "seeds", "steps", "mean", "95% CI", "IQM", "95% CI", "published", "source", "train s"):
        out.add_column(column, justify="left" if column in ("recipe", "source") else "right")
    for name, runs in figures.items():
        means = [run["mean"] for run in runs]
        interval = t_interval(means) if len(means) > 1 else None
        middle = iqm_interval([means])
        published = (SCORES | MORE_SCORES).get(name)
        out.add_row(
            name,
            str(len(runs)),
            f"{runs[0]['steps']:,}",
            f"{statistics.fmean(means):,.1f}",
            f"{interval.low:,.1f} to {interval.high:,.1f}" if interval else "-",
            f"{iqm(means):,.1f}",
            f"{middle.low:,.1f} to {middle.high:,.1f}" if math.isfinite(middle.low) else "-",
            f"{published.mean:,.1f} ± {published.std:,.1f} ({published.steps})" if published else "-",
            published.source if published else "",
            f"{statistics.median(run['train_seconds'] for run in runs):.1f}",
        )
    return out
