"""`lockstep bench imports`: every stored network of every framework beside what that framework computed, in one table.

For each file: parameters trainable and in all, the largest error at three batch sizes (and two lengths of sequences) relative
to the largest value of that output, whether the gradient reaches every weight, and with --train what 200 updates of PPO do for
the return. Any row that misses its line makes the command fail.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from lockstep.api import evaluate
from lockstep.api import train as train_policy
from lockstep.core.errors import ConfigError, LockstepError
from lockstep.interop.readers import load
from lockstep.models.graph import GraphModule, save_graph
from lockstep.runs.versions import describe_versions

TOLERANCE = 1e-5
INPUTS = ("x", "obs", "cont")
NOT_OUTPUTS = ("a", "log_std")
RECORDED = ("value", "logits")
"""Outputs of Caffe's recurrent network among the blobs that its file holds."""


@dataclass(frozen=True)
class Case:
    """A file, the stored inputs and outputs beside it (by stem), and how it is read.

    `axis` is that of the rows; `steps` that of a sequence whose first outputs do not depend on the later ones.
    """

    file: str
    io: str
    options: dict[str, object] = field(default_factory=dict)
    axis: int = 0
    steps: int | None = None
    reader: str = "load"
    actions: int = 0
    """Columns of the output that is the policy, for --train (0: not trained)."""
    continuous: bool = False


def _cases() -> list[Case]:
    sequence: dict[str, Any] = {"steps": 1, "actions": 4}
    time_first: dict[str, Any] = {"axis": 1, "steps": 0, "actions": 4}
    mean: dict[str, Any] = {"actions": 3, "continuous": True}
    kinds: dict[str, dict[str, Any]] = {"mlp": mean, "cnn": {"actions": 6}, "gru": sequence, "lstm": sequence}
    cases = [Case(f"caffe/{n}.prototxt", f"caffe/{n}", **kinds[n]) for n in ("mlp", "cnn")]
    cases += [Case("caffe/cnn.caffemodel.h5", "caffe/cnn"), Case("caffe/mlp.caffemodel.h5", "caffe/mlp")]
    cases += [Case("caffe/lstm.prototxt", "caffe/lstm", axis=1, steps=0, reader="caffe")]
    cases += [Case(f"cntk/{n}.model", f"cntk/{n}", **kinds[n]) for n in ("mlp", "cnn")]
    cases += [Case(f"cntk/{n}.model", f"cntk/{n}", steps=1, reader="cntk") for n in ("gru", "lstm")]
    cases += [
        Case("mxnet/mlp-symbol.json", "mxnet/mlp", **mean),
        Case("mxnet/symmlp-symbol.json", "mxnet/symmlp", actions=4),
    ]
    cases += [Case("mxnet/cnn-symbol.json", "mxnet/cnn", {"shapes": "data=4,84,84"}, actions=6)]
    cases += [Case(f"mxnet/{n}-symbol.json", f"mxnet/{n}", **time_first) for n in ("gru", "lstm")]
    cases += [Case(f"mxnet/{n}.onnx", f"mxnet/{n}") for n in ("mlp", "symmlp", "cnn")]
    cases += [Case(f"mxnet/{n}.onnx", f"mxnet/{n}", axis=1, steps=0) for n in ("gru", "lstm")]
    for n in ("mlp", "cnn", "gru", "lstm"):
        cases += [Case(f"paddle/{n}.json", f"paddle/{n}", **kinds[n]), Case(f"paddle/{n}.pdparams", f"paddle/{n}")]
        cases += [Case(f"paddle/{n}_pexport.onnx", f"paddle/{n}")]
        cases += [Case(f"tf/{n}.keras", f"tf/{n}", **kinds[n]), Case(f"tf/{n}.h5", f"tf/{n}")]
        cases += [Case(f"tf/{n}_saved", f"tf/{n}"), Case(f"tf/{n}_tf2onnx.onnx", f"tf/{n}")]
    cases += [Case("paddle/cnn_old.pdmodel", "paddle/cnn"), Case("paddle/lstm_cli_pd.onnx", "paddle/lstm")]
    cases += [Case(f"tf/{n}_kexport.onnx", f"tf/{n}") for n in ("mlp", "gru", "lstm")]
    cases += [Case(f"tf/{n}_fromkeras.onnx", f"tf/{n}") for n in ("mlp", "lstm")]
    cases += [Case("tf/raw_saved", "tf/raw", actions=6), Case("tf/raw_tf2onnx.onnx", "tf/raw")]
    cases += [Case("tf/tf1_frozen.pb", "tf/tf1"), Case("tf/tf1_model.ckpt.meta", "tf/tf1")]
    cases += [
        Case(f"tf/tf1_{n}.onnx", "tf/tf1", actions=3 if n == "frozen" else 0, continuous=True)
        for n in ("frozen", "ckpt")
    ]
    for n in ("k2cnn", "k2rnn"):
        cases += [Case(f"keras2/{n}.{end}", f"keras2/{n}") for end in ("keras", "h5")]
    cases += [Case("keras2/k2cnn_sm", "keras2/k2cnn"), Case("keras2/k2cnn.onnx", "keras2/k2cnn")]
    cases += [Case("keras2/dqn_policy", "keras2/dqn", actions=2)]
    return cases


@dataclass(frozen=True)
class ImportsArgs:
    """Read every stored network of every framework and compare."""

    fixtures: Path = Path("tests/fixtures/frameworks")
    """Folder with one folder for each framework."""
    only: str = ""
    """Files whose name holds this text."""
    train: bool = False
    """Train each policy for 200 updates of PPO and compare returns."""
    present: bool = False
    """Leave out files that the folder does not have, instead of failing on them."""
    json: Path | None = None
    """File to write the rows to."""


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
    failures: list[str] = field(default_factory=list)


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ImportsArgs, args=list(args), prog="lockstep bench imports")
    if not wish.fixtures.is_dir():
        raise ConfigError(f"{wish.fixtures} is no folder; give --fixtures")
    rows = []
    for case in _cases():
        path = wish.fixtures / case.file
        if wish.only not in case.file or (wish.present and not path.exists()):
            continue
        row = measure(case, wish.fixtures)
        if wish.train and case.actions and not row.failures:
            train(case, wish.fixtures, row)
        rows.append(row)
        print(json.dumps(asdict(row)), flush=True)
    _print(rows)
    if wish.json is not None:
        document = {"versions": describe_versions(), "tolerance": TOLERANCE, "rows": [asdict(row) for row in rows]}
        wish.json.write_text(json.dumps(document, indent=1) + "\n")
    failed = [row.file for row in rows if row.failures]
    if failed or not rows:
        Console().print(f"[red]{len(failed)} of {len(rows)} rows miss their line: {', '.join(failed)}")
        return 1
    return 0


Run = Callable[[dict[str, np.ndarray]], list[torch.Tensor]]


def opened(case: Case, fixtures: Path) -> tuple[torch.nn.Module, Run]:
    """The module, and how stored inputs go through it."""
    path = fixtures / case.file
    if case.reader == "caffe":
        from lockstep.interop.caffe.graph import load_caffe

        net: torch.nn.Module = load_caffe(path, path.with_suffix(".caffemodel"))
    elif case.reader == "cntk":
        from lockstep.interop.cntk.graph import load_cntk

        net = load_cntk(path)
    else:
        options: dict[str, Any] = dict(case.options)
        net = load(path, **options)

    def run(inputs: dict[str, np.ndarray]) -> list[torch.Tensor]:
        tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs.values()]
        if isinstance(net, GraphModule) and len(net.graph.inputs) > len(tensors):
            # TF-Agents' exports also take the step's type, reward and discount.
            raise ConfigError(f"{case.file} reads {len(net.graph.inputs)} inputs")
        out = net(*tensors)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    return net, run


def measure(case: Case, fixtures: Path) -> Row:
    """Error, parameters and gradients of one file."""
    row = Row(case.file)
    stored = dict(np.load(fixtures / f"{case.io}_io.npz"))
    try:
        net, run = opened(case, fixtures)
    except (LockstepError, OSError) as error:
        row.failures.append(f"{type(error).__name__}: {error}")
        return row
    inputs = {key: stored[key] for key in INPUTS if key in stored}
    wanted = {key: value for key, value in stored.items() if key not in (*INPUTS, *NOT_OUTPUTS)}
    if "caffe" in case.file:
        # Caffe's files hold every blob by name, inner ones too.
        names = [port.name for port in net.graph.outputs] if isinstance(net, GraphModule) else RECORDED
        wanted = {key: value for key, value in wanted.items() if key in names}
    parameters = dict(net.named_parameters())
    weights = {name: p for name, p in parameters.items() if p.requires_grad}
    row.trainable = sum(p.numel() for p in weights.values())
    held = net.state_dict()
    statistics = [b for name, b in net.named_buffers() if name in held and b.dtype.is_floating_point]
    row.total = sum(p.numel() for p in parameters.values()) + sum(b.numel() for b in statistics)
    whole = next(iter(inputs.values())).shape[case.axis]
    row.batches = tuple(sorted({1, 2, whole}))
    try:
        _compare(case, run, inputs, wanted, row)
        _gradients(run(inputs), weights, row)
    except (LockstepError, RuntimeError) as error:
        row.failures.append(f"{type(error).__name__}: {error}")
    if not row.error <= TOLERANCE:
        row.failures.append(f"relative error {row.error:.1e} is above {TOLERANCE:.0e}")
    if row.unreached:
        row.failures.append(f"no gradient at {row.unreached[:3]}")
    return row


def _compare(case: Case, run: Run, inputs: dict[str, np.ndarray], wanted: dict[str, np.ndarray], row: Row) -> None:
    errors = []
    parts = [(case.axis, num) for num in row.batches]
    if case.steps is not None:
        length = next(iter(inputs.values())).shape[case.steps]
        row.lengths = (length - 2, length)
        parts.append((case.steps, length - 2))
    with torch.no_grad():
        for axis, num in parts:
            outs = run({key: x.take(range(num), axis) for key, x in inputs.items()})
            for key, value in wanted.items():
                want = value.take(range(num), axis)
                scale = max(float(np.abs(value).max()), 1e-6)
                near = [float(np.abs(y.numpy() - want).max()) / scale for y in outs if tuple(y.shape) == want.shape]
                if not near:
                    row.failures.append(f"no output has the shape {want.shape} of {key}")
                errors.append(min(near, default=float("nan")))
    row.error = float(np.max(errors)) if errors else float("nan")


def _gradients(outs: list[torch.Tensor], weights: Mapping[str, torch.Tensor], row: Row) -> None:
    rng = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for y in outs:
        if y.dtype.is_floating_point:
            loss = loss + (y * torch.randn(y.shape, generator=rng)).sum()
    grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    row.unreached = [name for name, g in zip(weights, grads, strict=True) if g is None or not bool(g.any())]


def train(case: Case, fixtures: Path, row: Row) -> None:
    """200 updates of PPO on a task of the network's own shapes, and the mean return before and after."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        module, _ = opened(case, fixtures)
        assert isinstance(module, GraphModule)
        shape = np.load(fixtures / f"{case.io}_io.npz")
        x = shape["x"] if "x" in shape else shape["obs"]
        is_image = x.ndim == 4
        columns = x.shape[3] if is_image and x.shape[3] <= 4 else x.shape[1] if is_image else x.shape[-1]
        kwargs = {"columns": int(columns), "actions": case.actions, "continuous": case.continuous, "image": is_image}
        layout = module.graph.about.layout or ("NHWC" if is_image and x.shape[3] <= 4 else "NCHW" if is_image else "")
        time_axis = 0 if case.steps == 0 else module.graph.about.time_axis
        module.graph = replace(module.graph, about=replace(module.graph.about, layout=layout, time_axis=time_axis))
        save_graph(module, out / "network")
        num_steps = 8 if is_image else 32
        returns = []
        for rate, updates in ((1e-12, 1), (1e-3, 200)):
            run = train_policy(
                "ppo-cartpole",
                out=out / f"runs{updates}",
                env__id="lockstep.cli.bench_imports_task:Pointing",
                env__kwargs=kwargs,
                env__num_envs=8,
                network__imported=str(out / "network"),
                num_steps=num_steps,
                num_epochs=2,
                learning_rate=rate,
                learning_rate_end=None,
                minibatch_size=64,
                run__total_steps=updates * 8 * num_steps,
                run__final_episodes=0,
                run__eval_every=0,
                run__tensorboard=False,
            )
            found = evaluate(run.path, episodes=64)
            returns.append(found.mean)
    row.before, row.after = returns
    if not returns[1] > returns[0]:
        row.failures.append(f"200 updates took the return from {returns[0]:.2f} to {returns[1]:.2f}")


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
