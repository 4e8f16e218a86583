"""`lockstep bench kernels`: products with packed matrices beside what the machine can do at most and torch's own.

The shapes are the linears of a 0.5B model (Qwen2.5: width 896, feed-forward 4864, 128 key and 128 value outputs). One row
is bound by reading weights, hundreds of rows by arithmetic, so each is printed as a fraction of that limit, measured in
the same run. Before a figure is printed the kernel is held against its naive twin.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from lockstep import kernels
from lockstep.cli.figures import measured_with
from lockstep.core.errors import ConfigError, LockstepError, unknown_name
from lockstep.kernels import native
from lockstep.kernels.packed_linear import FORMATS, PackedWeight, pack, packed_linear, stack

SHAPES = ((1152, 896), (896, 896), (9728, 896), (896, 4864))
"""(outputs, inputs): query + key + value, output, gate + up, down."""
STREAMED_BYTES = 200 << 20  # more than any cache; as many layers as that takes are read in turn
READ_WINDOW = 8 << 20  # about the bytes of the largest product, so that both have the same chance of a quiet moment
PEAK_KIND = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
"""LsPeak of csrc/lockstep.h: the instructions that a format's products take."""


@dataclass(frozen=True)
class KernelBenchArgs:
    """Measure packed products in GB/s of weights (one row) and Gop/s (many rows)."""

    formats: tuple[str, ...] = FORMATS
    """Weight formats."""
    rows: tuple[int, ...] = (8, 32, 512)
    """Row counts beside 1."""
    threads: int = 2
    """Threads of a call."""
    seconds: float = 2.0
    """Time for each figure; the fastest call counts, since whatever else runs can only slow one down."""
    json: Path | None = None
    """Also write the figures to this file."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(KernelBenchArgs, args=list(args), prog="lockstep bench kernels")
    for name in wish.formats:
        if name not in FORMATS:
            raise ConfigError(unknown_name("weight format", name, FORMATS))
    if not native.usable():
        raise ConfigError("there are no compiled kernels to measure; install a C++ compiler and reinstall lockstep-rl")
    if min((*wish.rows, wish.threads)) < 1 or wish.seconds <= 0:
        raise ConfigError("rows and threads must be at least 1 and seconds above 0")
    before = kernels.num_threads(), torch.get_num_threads()
    kernels.set_num_threads(wish.threads)
    try:
        figures = measure(wish)
    finally:
        kernels.set_num_threads(before[0])
        torch.set_num_threads(before[1])
    Console(width=None if sys.stdout.isatty() else 160).print(table(figures))
    if wish.json is not None:
        wish.json.write_text(json.dumps({"versions": measured_with(), **figures}, indent=2) + "\n")
    return 0


def measure(wish: KernelBenchArgs) -> dict[str, Any]:
    """Limits, then every format, then torch's bf16 product."""
    generator = torch.Generator().manual_seed(0)
    figures: dict[str, Any] = {"threads": wish.threads, "level": native.describe()["level"], "formats": {}}
    figures["limits"] = limits(wish)
    for name in wish.formats:
        layer = [pack(torch.randn(shape, generator=generator) * 0.02, name) for shape in SHAPES]
        for packed in layer:
            check(packed, generator)
        figure: dict[str, Any] = {"bytes_per_weight": layer[0].bytes_per_weight, "read_gb_s": stream(layer, wish)}
        for num_rows in wish.rows:
            figure[f"gop_s_{num_rows}"] = arithmetic(layer, num_rows, wish)
        figures["formats"][name] = figure
    figures["torch_bf16"] = {f"gop_s_{num_rows}": torch_arithmetic(num_rows, wish) for num_rows in wish.rows}
    return figures


def fastest(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call, three at least."""
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def limits(wish: KernelBenchArgs) -> dict[str, float]:
    """GB/s of a plain read and Gop/s of bare multiply-adds, by kind of operand; 0 where there is no such instruction."""
    library = native.lib()
    memory = pack(torch.zeros(STREAMED_BYTES // 4096, 1024), "fp32").data
    window = min(READ_WINDOW, memory.numel())
    places = range(memory.data_ptr(), memory.data_ptr() + memory.numel() - window + 1, window)
    best, end = float("inf"), time.perf_counter() + wish.seconds
    while time.perf_counter() < end:
        for place in places:
            start = time.perf_counter()
            library.ls_read_memory(place, window)
            best = min(best, time.perf_counter() - start)
    found = {"read_gb_s": window / best / 1e9}
    for name, kind in PEAK_KIND.items():
        tasks = 4 * wish.threads
        operations = library.ls_peak_operations(kind, 20_000, tasks)
        seconds = fastest(partial(library.ls_peak_operations, kind, 20_000, tasks), wish.seconds)
        found[name] = operations / seconds / 1e9
    return found


def check(packed: PackedWeight, generator: torch.Generator) -> None:
    """A few rows against the naive twin; the first outputs stand for all, which go through the same tiles."""
    x = torch.randn(7, packed.num_inputs, generator=generator)
    num_panels = min(3, packed.num_panels)
    num_bytes = packed.expert_bytes // packed.num_panels * num_panels
    num_outputs = min(num_panels * packed.panel, packed.num_outputs)
    part = replace(packed, num_outputs=num_outputs, data=packed.data[:num_bytes])
    with kernels.force("naive"):
        slow = packed_linear(x, part)
    fast = packed_linear(x, packed)[:, : part.num_outputs]
    if float((fast - slow).abs().max()) > 1e-4 * float(slow.abs().max()):
        raise LockstepError(f"the {packed.format} kernel differs from its naive twin; no figure is worth printing")


def stream(layer: list[PackedWeight], wish: KernelBenchArgs) -> float:
    """GB/s of weight bytes at one row, over so many layers that none is still in a cache."""
    layer_bytes = sum(packed.expert_bytes for packed in layer)
    copies = [layer]
    while len(copies) * layer_bytes < STREAMED_BYTES:
        copies.append([stack([packed]).expert(0) for packed in layer])
    rows = {packed.num_inputs: torch.randn(1, packed.num_inputs) for packed in layer}
    best, end = [float("inf")] * len(layer), time.perf_counter() + wish.seconds
    while time.perf_counter() < end:
        for copy in copies:
            for index, packed in enumerate(copy):
                start = time.perf_counter()
                packed_linear(rows[packed.num_inputs], packed)
                best[index] = min(best[index], time.perf_counter() - start)
    return layer_bytes / sum(best) / 1e9


def arithmetic(layer: list[PackedWeight], num_rows: int, wish: KernelBenchArgs) -> float:
    """Gop/s of the four products of a layer."""
    rows = {packed.num_inputs: torch.randn(num_rows, packed.num_inputs) for packed in layer}
    seconds = sum(
        fastest(partial(packed_linear, rows[packed.num_inputs], packed), wish.seconds / len(layer)) for packed in layer
    )
    return sum(2 * num_rows * p.num_outputs * p.num_inputs for p in layer) / seconds / 1e9


def torch_arithmetic(num_rows: int, wish: KernelBenchArgs) -> float:
    """The same of torch's bf16 product (oneDNN)."""
    torch.set_num_threads(wish.threads)
    total = 0.0
    for num_outputs, num_inputs in SHAPES:
        x = torch.randn(num_rows, num_inputs).bfloat16()
        weight = torch.randn(num_outputs, num_inputs).bfloat16()
        total += fastest(partial(torch.nn.functional.linear, x, weight), wish.seconds / len(SHAPES))
    torch.set_num_threads(1)
    return sum(2 * num_rows * n * k for n, k in SHAPES) / total / 1e9


def table(figures: dict[str, Any]) -> Table:
    """GB/s and Gop/s, each with the fraction of its limit."""
    limit = figures["limits"]
    keys = [key for key in next(iter(figures["formats"].values())) if key.startswith("gop_s_")]
    out = Table(title=f"packed products, {figures['threads']} threads, {figures['level']}")
    for column in ("format", "bytes/weight", "1 row GB/s", *(f"{key[6:]} rows Gop/s" for key in keys)):
        out.add_column(column, justify="left" if column == "format" else "right")
    for name, figure in figures["formats"].items():
        peak = limit[name] or (limit["fp32"] if name == "bf16" else 0.0)
        cells = [_share(figure[key], peak) for key in keys]
        out.add_row(name, f"{figure['bytes_per_weight']:.4g}", _share(figure["read_gb_s"], limit["read_gb_s"]), *cells)
    out.add_row("torch bf16", "", "", *(_share(figures["torch_bf16"][key], limit["bf16"]) for key in keys))
    peaks = ", ".join(f"{name} {limit[name]:,.0f} Gop/s" for name in PEAK_KIND if limit[name])
    out.caption = f"limits in this run: read {limit['read_gb_s']:.1f} GB/s, {peaks}"
    return out


def _share(value: float, limit: float) -> str:
    return f"{value:,.1f} ({value / limit:.0%})" if limit else f"{value:,.1f}"
