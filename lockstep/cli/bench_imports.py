"""`lockstep bench imports`: every stored network of every framework beside what that framework computed, in one table.

For each file: parameters trainable and in all, the largest error at three batch sizes (and two lengths of sequences) relative
to the largest value of that output, whether the gradient reaches every weight, and with --train what 200 updates of PPO do for
the return. Any row that misses its line makes the command fail.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from lockstep.cli.bench_imports_cases import Case, stored_networks
from lockstep.cli.bench_imports_train import train_stored
from lockstep.core.errors import ConfigError, LockstepError
from lockstep.interop.readers import load
from lockstep.models.graph import GraphModule
from lockstep.runs.versions import describe_versions

TOLERANCE = 1e-5
INPUTS = ("x", "obs", "cont")
NOT_OUTPUTS = ("a", "log_std")
LEAST_BATCHES = 3


@dataclass(frozen=True)
class ImportsArgs:
    """Read every stored network of every framework and compare."""

    fixtures: tuple[Path, ...] = (Path("tests/fixtures/frameworks"),)
    """Folders with one folder for each framework; a file is taken from the first that has it."""
    only: str = ""
    """Files whose name holds this text."""
    train: bool = False
    """Train each policy for 200 updates of PPO and compare returns."""
    present: bool = False
    """Leave out files that the folder does not have, instead of failing on them."""
    json: Path | None = None
    """File to write the rows to."""
    resume: bool = False
    """Keep the rows that this file has already and that met their line; it must be of the same commit."""


@dataclass
class Row:
    """One line of the table; `failures` is what it misses."""

    file: str
    trainable: int = 0
    total: int = 0
    error: float = float("nan")
    batches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    unreached: list[str] = field(default_factory=list)
    before: float | None = None
    after: float | None = None
    interval: tuple[float, float] | None = None
    """95% interval of `after`."""
    failures: list[str] = field(default_factory=list)


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ImportsArgs, args=list(args), prog="lockstep bench imports")
    for folder in wish.fixtures:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; give --fixtures")
    kept = _kept(wish) if wish.resume else {}
    rows = []
    for case in stored_networks():
        is_present = _found(wish.fixtures, case.file).exists()
        if wish.only not in case.file or (wish.present and not is_present):
            continue
        row = kept.get(case.file) or measure(case, wish.fixtures, with_training=wish.train)
        rows.append(row)
        print(json.dumps(asdict(row)), flush=True)
        if wish.json is not None:
            document = {"versions": describe_versions(), "tolerance": TOLERANCE, "rows": [asdict(row) for row in rows]}
            wish.json.write_text(json.dumps(document, indent=1) + "\n")
    _print(rows)
    failed = [row.file for row in rows if row.failures]
    if failed or not rows:
        Console().print(f"[red]{len(failed)} of {len(rows)} rows miss their line: {', '.join(failed)}")
        return 1
    return 0


def _kept(wish: ImportsArgs) -> dict[str, Row]:
    """File -> its row of an earlier run that was ended."""
    if wish.json is None:
        raise ConfigError("--resume continues the file that --json names; give --json")
    if not wish.json.exists():
        return {}
    document = json.loads(wish.json.read_text())
    if document["versions"] != describe_versions():
        raise ConfigError(f"{wish.json} is of {document['versions']}, this is {describe_versions()}; start anew")
    rows = [Row(**row) for row in document["rows"]]
    return {row.file: row for row in rows if not row.failures and (row.before is not None or not wish.train)}


def _found(fixtures: Sequence[Path], name: str) -> Path:
    """The file in the first folder that has it."""
    return next((folder / name for folder in fixtures if (folder / name).exists()), fixtures[0] / name)


def measure(case: Case, fixtures: Sequence[Path], *, with_training: bool = False) -> Row:
    """Error, parameters and gradients of one file, and its training."""
    row = Row(case.file)
    try:
        net = load(_found(fixtures, case.file), **case.options)
        inputs, wanted = _stored(case, _found(fixtures, f"{case.io}_io.npz"), net)
        parameters = dict(net.named_parameters())
        weights = {name: p for name, p in parameters.items() if p.requires_grad}
        row.trainable = sum(p.numel() for p in weights.values())
        held = net.state_dict()
        statistics = [b for name, b in net.named_buffers() if name in held and b.dtype.is_floating_point]
        row.total = sum(p.numel() for p in parameters.values()) + sum(b.numel() for b in statistics)
        _compare(case, net, inputs, wanted, row)
        if case.short:
            short = _stored(case, _found(fixtures, f"{case.short}_io.npz"), net)
            _compare_short(net, next(iter(inputs.values())).shape[1], *short, row)
        _gradients(run(net, inputs), weights, row)
        if with_training:
            _train(case, net, inputs, wanted, row)
    except (LockstepError, OSError, RuntimeError) as error:
        row.failures.append(f"{type(error).__name__}: {error}")
        return row
    if not row.error <= TOLERANCE:
        row.failures.append(f"relative error {row.error:.1e} is above {TOLERANCE:.0e}")
    if row.unreached:
        row.failures.append(f"no gradient at {row.unreached[:3]}")
    return row


def _stored(case: Case, path: Path, net: GraphModule) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(inputs, outputs that the framework computed)."""
    stored = dict(np.load(path))
    inputs = {key: stored[key] for key in INPUTS if key in stored}
    if case.one_hot:
        inputs = {key: np.eye(case.one_hot, dtype=np.float32)[x] for key, x in inputs.items()}
    wanted = {key: value for key, value in stored.items() if key not in (*INPUTS, *NOT_OUTPUTS)}
    if case.file.startswith("caffe/"):
        # Caffe's files hold every blob by name, inner ones too.
        names = [port.name for port in net.graph.outputs]
        wanted = {key: value for key, value in wanted.items() if key in names}
    return inputs, wanted


def run(net: GraphModule, inputs: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
    """Every output for the stored inputs."""
    return net.outputs([torch.from_numpy(np.ascontiguousarray(x)) for x in inputs.values()])


def _compare(
    case: Case, net: GraphModule, inputs: dict[str, np.ndarray], wanted: dict[str, np.ndarray], row: Row
) -> None:
    """Batches of 1, 2 and all rows (of 3 where 2 are stored: the first comes twice), and a shorter sequence."""
    errors = []
    stored = next(iter(inputs.values())).shape[case.axis]
    row.batches = tuple(sorted({1, 2, max(stored, LEAST_BATCHES)}))
    parts = [(case.axis, num) for num in row.batches]
    if case.steps is not None:
        length = next(iter(inputs.values())).shape[case.steps]
        row.lengths = (length - 2, length)
        parts.append((case.steps, length - 2))
    with torch.no_grad():
        for axis, num in parts:
            places = [i % stored for i in range(num)] if axis == case.axis else range(num)
            outs = run(net, {key: x.take(places, axis) for key, x in inputs.items()})
            for key, value in wanted.items():
                errors.append(_distance(outs, key, value.take(places, axis), float(np.abs(value).max()), row))
    row.error = float(np.max(errors)) if errors else float("nan")


@torch.no_grad()
def _compare_short(
    net: GraphModule, length: int, inputs: dict[str, np.ndarray], wanted: dict[str, np.ndarray], row: Row
) -> None:
    """Shorter sequences than `length`, whose last outputs the framework computed too."""
    row.lengths = (next(iter(inputs.values())).shape[1], length)
    outs = run(net, inputs)
    errors = [_distance(outs, key, want, float(np.abs(want).max()), row) for key, want in wanted.items()]
    row.error = float(np.max([row.error, *errors]))


def _distance(outs: list[torch.Tensor], key: str, want: np.ndarray, largest: float, row: Row) -> float:
    """The largest error of the output that `key` is, relative to its largest value."""
    near = [float(np.abs(y.numpy() - want).max()) for y in outs if tuple(y.shape) == want.shape]
    if not near:
        row.failures.append(f"no output has the shape {want.shape} of {key}")
    return min(near, default=float("nan")) / max(largest, 1e-6)


def _gradients(outs: list[torch.Tensor], weights: Mapping[str, torch.Tensor], row: Row) -> None:
    rng = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for y in outs:
        if y.dtype.is_floating_point:
            loss = loss + (y * torch.randn(y.shape, generator=rng)).sum()
    grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    row.unreached = [name for name, g in zip(weights, grads, strict=True) if g is None or not bool(g.any())]


def _train(
    case: Case, net: GraphModule, inputs: dict[str, np.ndarray], wanted: dict[str, np.ndarray], row: Row
) -> None:
    # A network's value has one column, and so has the only action of some.
    columns = next((value.shape[-1] for value in wanted.values() if value.shape[-1] > 1), 1)
    x = next(iter(inputs.values()))
    found = train_stored(net, x, columns, continuous=case.continuous, time_axis=case.steps)
    row.before, row.after, row.interval = found.before, found.after, found.interval
    if not found.interval[0] > found.before:
        row.failures.append(
            f"200 updates took the return from {found.before:.2f} to {found.after:.2f} "
            f"({found.interval[0]:.2f} to {found.interval[1]:.2f})"
        )


def _print(rows: list[Row]) -> None:
    table = Table(title="networks of other frameworks")
    for name in ("file", "trainable", "total", "max rel. error", "batches", "lengths", "gradient", "return", "line"):
        table.add_column(name, justify="left" if name in ("file", "line") else "right")
    for row in rows:
        gained = "" if row.before is None else f"{row.before:.2f} -> {row.after:.2f}"
        table.add_row(
            row.file,
            f"{row.trainable:,}",
            f"{row.total:,}",
            f"{row.error:.1e}",
            "/".join(map(str, row.batches)),
            "/".join(map(str, row.lengths)),
            "every weight" if row.trainable and not row.unreached else "no",
            gained,
            "met" if not row.failures else row.failures[0][:60],
        )
    Console(width=180).print(table)
