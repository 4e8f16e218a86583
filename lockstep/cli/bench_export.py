"""`lockstep bench export`: one policy in every runtime, on observations that it met: same actions, errors, sizes, latencies.

A latency is the fastest of many calls with one row, measured where the runtime runs (LiteRT and ExecuTorch in their process,
onnxruntime-web under Node): whatever else the machine does can only slow a call down.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from lockstep.api import env_of, load
from lockstep.cli.export import TARGETS, export
from lockstep.cli.figures import measured_with
from lockstep.core.errors import ConfigError, MissingExtraError, unknown_name
from lockstep.models.control.policy import Policy

REPEAT = 300


@dataclass(frozen=True)
class ExportBenchArgs:
    """Export a policy to every target and compare the actions, on observations from its environment."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory or policy folder."""
    to: tuple[str, ...] = ()
    """Targets of lockstep export (default: all that are installed; what is missing is named)."""
    observations: int = 1000
    """Rows."""
    env: str = ""
    """Environment id or import path (default: the run's own)."""
    seed: int = 0
    """Seed of the environment."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class TargetFigures:
    """One target; `missing` says why there are no figures."""

    target: str
    kilobytes: float = 0.0
    """Of the file, or of the policy's files: a page's runtime is not counted."""
    latency_us: float = 0.0
    different_actions: int = 0
    """Rows whose action is another one (continuous: further off than 1e-4 of the range)."""
    max_error: float = 0.0
    """Largest error of any other output, relative to max(1, |value|)."""
    missing: str = ""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ExportBenchArgs, args=list(args), prog="lockstep bench export")
    for target in wish.to:
        if target not in TARGETS:
            raise ConfigError(unknown_name("export format", target, TARGETS))
    policy = load(wish.source)
    document = measure(policy, wish)
    Console(width=None if sys.stdout.isatty() else 120).print(table(document))
    for figure in document["targets"]:
        if figure["missing"]:
            print(f"{figure['target']}: {figure['missing']}")
    if wish.json is not None:
        wish.json.write_text(json.dumps({"versions": measured_with(), **document}, indent=2) + "\n")
    return 1 if any(figure["different_actions"] for figure in document["targets"]) else 0


def measure(policy: Policy, wish: ExportBenchArgs) -> dict[str, Any]:
    """What `--json` writes."""
    from lockstep.interop.program import PolicyProgram
    from lockstep.rl.recorded import recorded_inputs

    env = env_of(wish.source, wish.env)
    rows = recorded_inputs(policy, env, wish.observations, seed=wish.seed)
    program = PolicyProgram(policy, exactness="exact")

    def eager(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = program({name: torch.from_numpy(x) for name, x in inputs.items()})
        return {name: x.numpy() for name, x in outputs.items()}

    expected = eager(rows)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters()) / 1e3
    figures = [TargetFigures("eager", weights, fastest(eager, {name: x[:1] for name, x in rows.items()}))]
    for target in wish.to or TARGETS:
        try:
            figures.append(_target(target, policy, env.id, rows, expected))
        except MissingExtraError as error:
            if wish.to:
                raise
            figures.append(TargetFigures(target, missing=str(error)))
    return {
        "environment": env.id,
        "observations": wish.observations,
        "seed": wish.seed,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "targets": [asdict(figure) for figure in figures],
    }


def _target(target: str, policy: Policy, environment: str, rows: Any, expected: Any) -> TargetFigures:
    from lockstep.interop import load_exported
    from lockstep.interop.export.browser import BrowserProcess
    from lockstep.interop.export.edge import EdgeProcess

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"policy{TARGETS[target][0]}"
        export(target, policy, path, environment=environment)
        exported = load_exported(path)
        got = exported(rows)
        one = {name: x[:1] for name, x in rows.items()}
        if isinstance(exported.run, EdgeProcess | BrowserProcess):
            latency = exported.run.seconds(one, REPEAT) * 1e6
        else:
            latency = fastest(exported.run, one)
        files = path.glob("policy.*") if path.is_dir() else path.parent.glob("policy.*")
        size = sum(file.stat().st_size for file in files) / 1e3
        errors = [_error(got[name], want) for name, want in expected.items() if name != "action" and name in got]
        return TargetFigures(
            target, size, latency, _different(got["action"], expected["action"]), max(errors, default=0.0)
        )


def fastest(run: Callable[[Any], Any], one: Any) -> float:
    """Microseconds."""
    best = float("inf")
    for _ in range(REPEAT):
        start = time.perf_counter()
        run(one)
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def _error(got: np.ndarray, want: np.ndarray) -> float:
    scale = np.maximum(np.abs(want.astype(np.float64)), 1.0)
    return float((np.abs(got.astype(np.float64) - want) / scale).max(initial=0.0))


def _different(got: np.ndarray, want: np.ndarray) -> int:
    wrong = got != want
    if want.dtype.kind == "f":
        wrong = np.abs(got - want) > 1e-4 * np.maximum(np.ptp(want, axis=0, keepdims=True), 1e-6)
    return int(wrong.reshape(len(wrong), -1).any(axis=1).sum())


def table(document: dict[str, Any]) -> Table:
    """One row per target that is there."""
    title = f"{document['environment']}: {document['parameters']:,} parameters, {document['observations']} observations"
    out = Table(title=title)
    for column in ("target", "kB", "us a row", "different actions", "max error of other outputs"):
        out.add_column(column, justify="left" if column == "target" else "right")
    for f in document["targets"]:
        if not f["missing"]:
            columns = (
                f"{f['kilobytes']:.1f}",
                f"{f['latency_us']:.1f}",
                f"{f['different_actions']}",
                f"{f['max_error']:.1e}",
            )
            out.add_row(f["target"], *columns)
    return out
