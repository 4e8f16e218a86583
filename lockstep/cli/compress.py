"""`lockstep compress`: smaller policies from a trained one, each with its size, its latency and its return beside the
original's.

All are written as ONNX files and measured in ONNX Runtime on one thread, so that one figure can be held against another.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from lockstep.api import env_of, load, train
from lockstep.cli.figures import measured_with
from lockstep.core.errors import ConfigError, unknown_name
from lockstep.envs.control.config import EnvConfig
from lockstep.models.control.folder import save_policy
from lockstep.models.control.policy import Policy
from lockstep.models.control.pruning import prune_units, prune_weights
from lockstep.models.control.spec import NetworkConfig
from lockstep.rl.control.distill import PolicyDistillConfig
from lockstep.rl.evaluate import evaluate_decider
from lockstep.rl.session import RunConfig
from lockstep.runs.config_json import config_to_json

METHODS = {
    "prune-weights": "the smallest weights of each matrix become zero, then tuned towards the original",
    "prune-units": "the least important hidden units are taken out, then tuned towards the original",
    "int8-dynamic": "8-bit products, ranges found at each call",
    "int8-static": "8-bit products, ranges fixed on observations from the environment",
    "distill": "a smaller network learns to do what the original does",
}
ROUNDS, CALLS = 15, 100


@dataclass(frozen=True)
class CompressArgs:
    """Make a policy smaller, and tell what that did to its size, its latency and its return."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory or policy folder."""
    method: tuple[str, ...] = ("int8-static",)
    """One or more of prune-weights, prune-units, int8-dynamic, int8-static, distill."""
    out: Path | None = None
    """Folder for one folder per method (default: compressed/ in the source): policy.onnx and, except for int8, the policy."""
    ratio: float = 0.5
    """Fraction of the weights or units that pruning removes."""
    hidden_sizes: tuple[int, ...] = (16, 16)
    """Hidden layers of the distilled network."""
    tune_steps: int = 30_000
    """Environment steps of distillation, after pruning (0: none) and for distill."""
    env: str = ""
    """Environment id or import path (default: the run's own)."""
    episodes: int = 100
    """Whole episodes of each evaluation, the same ones for all."""
    observations: int = 1000
    """Rows met in the environment: for calibration, for importance, and to compare actions on."""
    seed: int = 0
    """Seed of environments and training."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Figures:
    """What is known of one of them."""

    name: str
    parameters: int
    """Numbers that are stored."""
    nonzero: int
    bytes: int
    """Of the ONNX file."""
    zipped: int
    """Of the file under zlib, where zeros cost little."""
    same_actions: float
    """Share of the recorded rows on which the best action is the original's (continuous: within 1% of the range)."""
    return_mean: float
    return_low: float
    return_high: float
    latency_us: float = 0.0
    """Of one row, the fastest call."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(CompressArgs, args=list(args), prog="lockstep compress")
    for method in wish.method:
        if method not in METHODS:
            raise ConfigError(unknown_name("method", method, METHODS))
    if min(wish.episodes, wish.observations) < 2 or wish.tune_steps < 0:
        raise ConfigError("episodes and observations are at least 2, tune_steps at least 0")
    policy = load(wish.source)
    env = env_of(wish.source, wish.env)
    out = wish.out or wish.source / "compressed"
    document = compress(policy, env, wish, out)
    Console(width=None if sys.stdout.isatty() else 150).print(table(document))
    print(f"wrote {out}")
    if wish.json is not None:
        wish.json.write_text(json.dumps({"versions": measured_with(), **document}, indent=2) + "\n")
    return 0


def compress(policy: Policy, env: EnvConfig, wish: CompressArgs, out: Path) -> dict[str, Any]:
    """Every method into a folder of `out`, then every figure; returns what `--json` writes."""
    from lockstep.interop import export_onnx, load_exported
    from lockstep.interop.export.quantised import export_int8
    from lockstep.rl.recorded import recorded_inputs, split_inputs

    rows = recorded_inputs(policy, env, wish.observations, seed=wish.seed)
    files: dict[str, Path] = {"original": out / "original" / "policy.onnx"}
    counts: dict[str, Policy] = {"original": policy}
    export_onnx(policy, files["original"], distribution=True)
    for method in wish.method:
        folder = out / method
        files[method], counts[method] = folder / "policy.onnx", policy
        if method.startswith("int8"):
            export_int8(policy, files[method], calibration=rows if method == "int8-static" else None)
            continue
        made = policy
        if method == "prune-weights":
            made = prune_weights(policy, wish.ratio)
        elif method == "prune-units":
            made = prune_units(policy, wish.ratio, *split_inputs(policy, rows))
        elif not wish.tune_steps:
            raise ConfigError("distill needs --tune-steps above 0")
        if wish.tune_steps:
            made = _tuned(wish, env, folder, None if method == "distill" else made, policy.spec.network)
        save_policy(made, folder, environment=config_to_json(env))
        export_onnx(made, files[method], distribution=True)
        counts[method] = made
    programs = {name: load_exported(path) for name, path in files.items()}
    latency = _latencies({name: program.run for name, program in programs.items()}, {n: x[:1] for n, x in rows.items()})
    expected = programs["original"](rows)["action"]
    figures = []
    for name, program in programs.items():
        same = _same(policy, program(rows)["action"], expected)
        figures.append(_figures(name, counts[name], files[name], program, env, wish, same, latency[name]))
    facts = {"environment": env.id, "episodes": wish.episodes, "observations": wish.observations, "ratio": wish.ratio}
    facts |= {"hidden_sizes": list(wish.hidden_sizes), "tune_steps": wish.tune_steps, "seed": wish.seed}
    return {**facts, "figures": [asdict(figure) for figure in figures]}


def _tuned(wish: CompressArgs, env: EnvConfig, folder: Path, start: Policy | None, network: NetworkConfig) -> Policy:
    """Distilled from the original on its environment, beginning with `start` or a new small network."""
    if start is not None:
        save_policy(start, folder / "untuned")
    # A recurrent teacher's student is a dense one.
    small = NetworkConfig(hidden_sizes=wish.hidden_sizes, activation=network.activation, encoder=network.encoder)
    config = PolicyDistillConfig(
        teacher=str(wish.source),
        student="" if start is None else str(folder / "untuned"),
        keep_zeros=start is not None,
        env=env,
        network=small,
        run=RunConfig(total_steps=wish.tune_steps, seed=wish.seed + 1, final_episodes=0, tensorboard=False),
    )
    return train(config, out=folder / "tuning", recipe_name="distill-policy").policy


def _same(policy: Policy, got: np.ndarray, expected: np.ndarray) -> float:
    """Share of rows with the same action."""
    wrong = got != expected
    if expected.dtype.kind == "f":
        span = np.ptp(expected, axis=0, keepdims=True)
        wrong = np.abs(got - expected) > 0.01 * np.maximum(span, 1e-6)
    return 1.0 - float(wrong.reshape(len(wrong), -1).any(axis=1).mean())


def _latencies(runs: dict[str, Callable[[Any], Any]], row: Any) -> dict[str, float]:
    """Microseconds of the fastest call with one row, in turns: whatever else the machine does can only slow one down."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            for _ in range(CALLS):
                start = time.perf_counter()
                run(row)
                best[name] = min(best[name], (time.perf_counter() - start) * 1e6)
    return best


def _figures(
    name: str, policy: Policy, path: Path, program: Any, env: EnvConfig, wish: CompressArgs, same: float, latency: float
) -> Figures:
    from lockstep.interop.exported import ExportedActor

    result = evaluate_decider(lambda num: ExportedActor(program, num), env, episodes=wish.episodes, seed=wish.seed)
    low, high = result.interval
    data = path.read_bytes()
    parameters = list(policy.parameters())
    return Figures(
        name,
        sum(p.numel() for p in parameters),
        sum(int((p != 0).sum()) for p in parameters),
        len(data),
        len(zlib.compress(data, 9)),
        same,
        result.mean,
        low,
        high,
        latency,
    )


def table(document: dict[str, Any]) -> Table:
    """One row each, the original first."""
    out = Table(title=f"{document['environment']}, {document['episodes']} episodes, ONNX Runtime, one thread")
    for column in (
        "policy",
        "parameters",
        "not zero",
        "kB",
        "kB zipped",
        "us a row",
        "same actions",
        "return (95% CI)",
    ):
        out.add_column(column, justify="left" if column == "policy" else "right")
    first = document["figures"][0]
    for f in document["figures"]:
        out.add_row(
            f["name"],
            f"{f['parameters']:,}",
            f"{f['nonzero']:,}",
            f"{f['bytes'] / 1e3:.1f}",
            f"{f['zipped'] / 1e3:.1f}",
            f"{f['latency_us']:.1f} ({first['latency_us'] / f['latency_us']:.2f}x)",
            f"{100 * f['same_actions']:.1f}%",
            f"{f['return_mean']:.1f} ({f['return_low']:.1f} to {f['return_high']:.1f})",
        )
    return out
