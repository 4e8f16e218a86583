"""`lockstep bench NAME`: measure beside other libraries; every figure is printed and, with --json, written."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from lockstep.core.errors import ConfigError, unknown_name

BENCHES = {
    "control": (
        "lockstep.cli.bench_control",
        "training steps per second beside Stable-Baselines3 and SBX; predict latency",
    ),
    "engine": ("lockstep.cli.bench_engine", "the engine beside llama.cpp or vLLM on the same weights"),
    "export": ("lockstep.cli.bench_export", "one policy in every runtime: same actions, sizes, latencies"),
    "imports": ("lockstep.cli.bench_imports", "stored networks of seven frameworks beside what those computed"),
    "kernels": ("lockstep.cli.bench_kernels", "matrix kernels beside the machine's limits and torch"),
    "language": ("lockstep.cli.bench_language", "language models over seeds: held-out scores before and after, curves"),
    "rl": ("lockstep.cli.bench_rl", "what exactness costs; a step of reinforcement of a language model beside TRL"),
    "scores": ("lockstep.cli.bench_scores", "returns over seeds beside published figures; wall-clock to solve"),
    "soak": ("lockstep.cli.bench_soak", "an engine under mixed traffic for minutes: memory, pages, texts"),
    "server": ("lockstep.cli.bench_server", "policy server under concurrent clients"),
}


def main(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: lockstep bench NAME [--json FILE] ...\n")
        print("\n".join(f"  {name:<9} {summary}" for name, (_, summary) in BENCHES.items()))
        return 0
    if args[0] not in BENCHES:
        raise ConfigError(unknown_name("benchmark", args[0], BENCHES))
    return importlib.import_module(BENCHES[args[0]][0]).main(args[1:])
