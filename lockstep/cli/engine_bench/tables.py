"""Figures of `lockstep bench engine` as tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from rich.table import Table

_BYTES = {"q4_0": 18 / 32, "q8_0": 34 / 32, "bf16": 2.0}
"""Of a weight in a GGUF file, scales included."""


def tables(figures: dict[str, Any]) -> Iterator[Table]:
    """One for each kind of measurement that was made."""
    formats = figures["formats"]
    for name, what in (("decode", "128 tokens of one text"), ("prefill", "a prompt of 512 tokens")):
        if any(name in figure for figure in formats.values()):
            yield _speeds(figures, name, what)
    if any("start" in figure for figure in formats.values()):
        yield _starts(figures)
    if figures["peer"] == "vllm":
        yield _loads(figures)


def spread(series: list[float], digits: int = 1) -> str:
    """Median (smallest - largest)."""
    median, low, high = statistics.median(series), min(series), max(series)
    return f"{median:,.{digits}f} ({low:,.{digits}f} - {high:,.{digits}f})"


def _speeds(figures: dict[str, Any], name: str, what: str) -> Table:
    limit = figures["limits"]
    bound = "DRAM" if name == "decode" else "arithmetic"
    out = Table(title=f"{name}: {what}, {figures['model']}, {figures['threads']} threads, tokens per second")
    for column in ("format", "engine", "median (min - max)", f"of the {bound} limit", "ours / it", "target"):
        out.add_column(column, justify="left" if column in ("format", "engine") else "right")
    for kind, figure in figures["formats"].items():
        if name not in figure:
            continue
        values, weights = figure[name]["values"], figure["weights"]
        ours = statistics.median(values["ours"])
        for engine, series in values.items():
            median = statistics.median(series)
            if name == "decode":
                share = median * weights * _BYTES[kind] / (limit["read_gb_s"] * 1e9)
            else:
                share = median * 2 * figure["layer_weights"] / (_peak(limit, kind) * 1e9)
            ratio = "" if engine == "ours" else f"{ours / median:.2f}x"
            target = f">= {figure[name]['target']}x" if engine == "ours" else ""
            out.add_row(kind if engine == "ours" else "", engine, spread(series), f"{share:.0%}", ratio, target)
        out.add_section()
    out.caption = f"limits in this run: {limit['read_gb_s']:.1f} GB/s" + "".join(
        f", {kind} {limit[kind]:,.0f} Gop/s" for kind in ("fp32", "bf16", "int8", "int4") if limit.get(kind)
    )
    return out


def _peak(limit: dict[str, float], kind: str) -> float:
    """Gop/s of the instructions that a format's products take; fp32 where the processor has none of its own."""
    wanted = {"bf16": "bf16", "q8_0": "int8", "q4_0": "int4"}[kind]
    return limit[wanted] or limit["fp32"]


def _starts(figures: dict[str, Any]) -> Table:
    out = Table(title=f"a server of {figures['model']}: from its start to the first token of the first request")
    for column in ("format", "server", "seconds, median (min - max)", "processor s", "resident MB", "peak MB"):
        out.add_column(column, justify="left" if column in ("format", "server") else "right")
    for kind, figure in figures["formats"].items():
        for index, (name, start) in enumerate(figure.get("start", {}).items()):
            sizes = [f"{statistics.median(start[key]) / 1e6:,.0f}" for key in ("resident", "peak")]
            cpu = f"{statistics.median(start['cpu']):.2f}"
            out.add_row("" if index else kind, name, spread(start["seconds"], 2), cpu, *sizes)
        out.add_section()
    return out


def _loads(figures: dict[str, Any]) -> Table:
    out = Table(title=f"output tokens per second, {figures['model']}, {figures['threads']} threads")
    for column in ("format", "load", "ours", "vLLM", "ours / it", "goal", "computed", "from cache", "equal to cold"):
        out.add_column(column, justify="left" if column in ("format", "load") else "right")
    for kind, figure in figures["formats"].items():
        for load, result in figure.items():
            if load == "peer":
                continue
            ours, vllm = (spread(result["values"][name]) for name in ("ours", "vllm"))
            counts = result["tokens"]["ours"]
            equal = result.get("equal_to_cold", {})
            same = ", ".join(
                f"{name} not compared" if num is None else f"{name} {num}/{result['num_texts']}"
                for name, num in equal.items()
            )
            numbers = [f"{counts[key]:,}" for key in ("computed", "cached")]
            out.add_row(kind, load, ours, vllm, f"{result['ratio']:.2f}x", f"{result['target']}x", *numbers, same)
        out.add_section()
    return out
