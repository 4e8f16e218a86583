"""`lockstep bench control`: our recipes beside Stable-Baselines3 and SBX, same environments, same hyper-parameters."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from lockstep.cli.figures import measured_with
from lockstep.core.env import child_environment
from lockstep.core.errors import ConfigError, unknown_name

# (case, our steps, peer steps, ratio to Stable-Baselines3 that we want, its reference median on two cores)
PLAN: dict[str, tuple[int, int, float, float]] = {
    "ppo-cartpole-8": (60_000, 16_384, 4.0, 6300.0),
    "ppo-halfcheetah-1": (20_480, 8_192, 3.0, 2100.0),
    "ppo-halfcheetah-8": (49_152, 16_384, 3.0, 3800.0),
    "dqn-cartpole": (20_000, 6_000, 4.0, 1700.0),
    "dqn-cartpole-zoo": (10_240, 4_096, 4.0, 0.0),
    "sac-halfcheetah": (2_000, 800, 3.0, 113.0),
    "predict": (0, 0, 0.0, 0.0),
    "import": (0, 0, 0.0, 0.0),
}
TIMES = ("predict", "import")  # cases of which less is better
IMPORTS = {"ours": "import lockstep", "ours, train": "from lockstep import train", "torch": "import torch"}
SBX_CASES = ("ppo-cartpole-8", "dqn-cartpole", "dqn-cartpole-zoo", "sac-halfcheetah")
BF16_CASES = ("dqn-cartpole-zoo", "sac-halfcheetah")  # where products of matrices take the time
PREDICT_TARGET_US = 8.0
IMPORT_TARGET_MS = 100.0  # beyond `import torch`
MEASUREMENT_DEADLINE_S = 900.0


@dataclass(frozen=True)
class ControlBenchArgs:
    """Measure training speed, predict latency and import time, alternating between libraries within one run."""

    cases: tuple[str, ...] = field(default_factory=lambda: tuple(PLAN))
    """Which measurements to make."""
    peers: tuple[str, ...] = ("sb3", "sbx")
    """Libraries to measure beside (sb3: Stable-Baselines3; sbx: its JAX twin); needs the bench extra."""
    rounds: int = 3
    """Measurements of each library, taken in turn."""
    peer_threads: tuple[int, ...] = (1, 0)
    """Thread settings tried for Stable-Baselines3 (0: PyTorch's default); the faster one counts."""
    json: Path | None = None
    """Also write the figures to this file."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ControlBenchArgs, args=list(args), prog="lockstep bench control")
    for name in wish.cases:
        if name not in PLAN:
            raise ConfigError(unknown_name("case", name, PLAN))
    console = Console(width=None if sys.stdout.isatty() else 200)
    figures: dict[str, Any] = {}
    for name in wish.cases:
        figures[name] = measure_case(name, wish)
        console.print(f"measured {name}")
    console.print(table(figures))
    if wish.json is not None:
        wish.json.write_text(json.dumps({"versions": measured_with(), "cases": figures}, indent=2) + "\n")
    return 0


def measure_case(name: str, wish: ControlBenchArgs) -> dict[str, Any]:
    """Every competitor's values, one process each, in turn."""
    if name == "import":
        rounds = [{who: _import_ms(statement) for who, statement in IMPORTS.items()} for _ in range(wish.rounds)]
        return {"values": {who: [one[who] for one in rounds] for who in IMPORTS}, "target_ratio": 0.0}
    ours_steps, peer_steps, want, reference = PLAN[name]
    # (label, who, case, steps, threads)
    competitors: list[tuple[str, str, str, int, int]] = [("ours", "ours", name, ours_steps, 0)]
    if name in BF16_CASES:
        competitors.append(("ours bf16", "ours", f"{name}-bf16", ours_steps, 0))
    if "sb3" in wish.peers:
        competitors += [(f"sb3 t={t or 'default'}", "sb3", name, peer_steps, t) for t in wish.peer_threads]
    if "sbx" in wish.peers and name in SBX_CASES:
        competitors.append(("sbx", "sbx", name, peer_steps, 0))
    if name == "predict":
        competitors.append(("onnxruntime", "onnx", name, 0, 0))
    values: dict[str, list[float]] = {label: [] for label, *_ in competitors}
    for _ in range(wish.rounds):
        for label, who, case, steps, threads in competitors:
            values[label].append(_measure(who, case, steps, threads))
    return {"values": values, "target_ratio": want, "reference_sb3_median": reference}


def _measure(who: str, case: str, steps: int, threads: int) -> float:
    command = [sys.executable, "-m", "lockstep.cli.bench_worker", who, case, str(steps), str(threads)]
    extra = {"JAX_PLATFORMS": "cpu"} if who == "sbx" else {}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=MEASUREMENT_DEADLINE_S, env=child_environment(**extra)
    )
    if done.returncode != 0:
        raise ConfigError(f"measuring {who} on {case} failed: {done.stderr.strip()[-1500:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["value"])


def _import_ms(statement: str) -> float:
    """Milliseconds of the statement in a fresh process."""
    program = f"import time; began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return 1e3 * float(done.stdout)


def table(figures: dict[str, Any]) -> Table:
    """Steps/s (µs for predict, ms for import) as min / median / max, with ratios to each peer's median."""
    out = Table(title="environment steps per second, collecting and learning (predict: us a call; import: ms)")
    for column in ("case", "library", "min", "median", "max", "best of ours / it", "target"):
        out.add_column(column, justify="left" if column in ("case", "library") else "right")
    for name, figure in figures.items():
        values: dict[str, list[float]] = figure["values"]
        ours = statistics.median(values["ours"])
        fast = max(statistics.median(values[label]) for label in values if label.startswith("ours"))
        best = best_sb3(values)
        for label, series in values.items():
            median = statistics.median(series)
            ratio = f"{median / ours if name == 'predict' else fast / median:.2f}x"
            if label.startswith("ours") or name == "import":
                ratio = ""
            target = f">= {figure['target_ratio']:g}x" if label == best and figure["target_ratio"] else ""
            if name == "predict" and label == "ours":
                target = f"<= {PREDICT_TARGET_US:g} us"
            if name == "import" and label == "ours":
                target = f"<= {statistics.median(values['torch']) + IMPORT_TARGET_MS:,.0f} ms"
            digits = 1 if name in TIMES else 0
            shown = [f"{value:,.{digits}f}" for value in (min(series), median, max(series))]
            out.add_row(name if label == "ours" else "", label, *shown, ratio, target)
        out.add_section()
    return out


def best_sb3(values: dict[str, list[float]]) -> str:
    """Label of the faster Stable-Baselines3 thread setting, the one the target is held against."""
    labels = [label for label in values if label.startswith("sb3")]
    return max(labels, key=lambda label: statistics.median(values[label])) if labels else ""
