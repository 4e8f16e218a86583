"""`lockstep caffe train | test | time`: Caffe's own command line, without Caffe.

lockstep caffe train --solver solver.prototxt --data rows.npz
lockstep caffe test --model net.prototxt --weights net.caffemodel --data rows.npz
lockstep caffe time --model net.prototxt --iterations 20
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro
from torch import Tensor

from lockstep.core.errors import ConfigError, InputError, unknown_name

if TYPE_CHECKING:
    from lockstep.interop.caffe.data import DataSource
    from lockstep.interop.caffe.graph import CaffeNetwork
    from lockstep.interop.caffe.reader import Blobs, NetSpec
    from lockstep.interop.caffe.solver import SolverConfig, SolverOptimiser


@dataclass(frozen=True)
class TrainArgs:
    """Train as a solver.prototxt says; snapshots are files that Caffe reads."""

    solver: Path
    """The solver.prototxt."""
    model: Path | None = None
    """The net, if not the one that the solver names."""
    weights: tuple[Path, ...] = ()
    """Weights to start from (.caffemodel or .caffemodel.h5)."""
    snapshot: Path | None = None
    """A .solverstate to go on from."""
    data: Path | None = None
    """An .npz with rows for the net's inputs by name; not needed for DummyData and HDF5Data."""
    device: str = ""
    """cpu, cuda or cuda:N (default: the solver's solver_mode and device_id)."""


@dataclass(frozen=True)
class TestArgs:
    """Run the net in its TEST phase and average what it puts out."""

    model: Path
    """The net."""
    weights: Path
    """Its weights."""
    iterations: int = 50
    """Batches."""
    data: Path | None = None
    """An .npz with rows for the net's inputs by name."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class TimeArgs:
    """Time each layer's forward pass, and the whole net forward and backward."""

    model: Path
    """The net."""
    weights: Path | None = None
    """Its weights (default: from the fillers)."""
    iterations: int = 50
    """Passes that are averaged."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""


def main(args: Sequence[str]) -> int:
    verbs: dict[str, Callable[[list[str]], int]] = {"train": _train_main, "test": _test_main, "time": _time_main}
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if args[0] not in verbs:
        raise ConfigError(unknown_name("command of lockstep caffe", args[0], verbs))
    return verbs[args[0]](list(args[1:]))


def _train_main(args: list[str]) -> int:
    return train(tyro.cli(TrainArgs, args=args, prog="lockstep caffe train"))


def _test_main(args: list[str]) -> int:
    wish = tyro.cli(TestArgs, args=args, prog="lockstep caffe test")
    from lockstep.interop.caffe.reader import read_net, read_weights

    if wish.iterations < 1:
        raise ConfigError(f"--iterations {wish.iterations} must be at least 1")
    spec = read_net(wish.model, phase="TEST")
    source = _source(spec, wish.data, 0)
    scores = evaluate(spec, read_weights(wish.weights), source, wish.iterations, choose_device(wish.device))
    for name, value in scores.items():
        print(f"{name} = {value:.6g}")
    return 0


def train(wish: TrainArgs) -> int:
    """Train as the solver says; see `TrainArgs`."""
    from lockstep.interop.caffe.graph import CaffeNetwork
    from lockstep.interop.caffe.reader import read_weights
    from lockstep.interop.caffe.solver import SolverOptimiser, learning_rate, read_solver
    from lockstep.interop.caffe.writer import network_blobs, read_state
    from lockstep.learn.fitting import fit

    file = read_solver(wish.solver)
    config = file.config
    device = choose_device(wish.device or ("cpu" if config.solver_mode == "CPU" else f"cuda:{config.device_id}"))
    spec = file.net("TRAIN", wish.model)
    source = _source(spec, wish.data, config.seed)
    iteration, history = 0, None
    weight_files = [*wish.weights] or [Path(name) for name in config.weights]
    if wish.snapshot is not None:
        iteration, name, history = read_state(wish.snapshot)
        weight_files = weight_files or [_beside(wish.snapshot, name)]
    net = CaffeNetwork(spec, None, shapes=source.shapes, with_loss=True, seed=config.seed).train().to(device)
    for path in weight_files:
        load_matching(net, read_weights(path), path)
    optimiser = SolverOptimiser(net.learnables(), config)
    if history is not None:
        optimiser.restore(iteration, history)
    tests = _Tests(file.net("TEST", wish.model), wish.data, config, device) if config.test_interval else None
    recent: deque[float] = deque(maxlen=config.average_loss)
    num_steps = max(config.max_iter - iteration, 0)
    batches = _on(device, source.batches())
    if tests is not None and config.test_initialization and iteration == 0:
        tests.report(0, network_blobs(net))
    print(f"{config.type}, {config.max_iter} iterations from {iteration} on {device}: {spec.path}")
    for loss in fit(
        lambda batch: net.loss(batch)[0], optimiser, batches, num_steps=num_steps, accumulate=config.iter_size
    ):
        done = optimiser.iteration
        recent.append(loss)
        if config.display and (done - 1) % config.display == 0:
            rate = learning_rate(config, done - 1)
            print(f"iteration {done - 1}  loss {sum(recent) / len(recent):.6g}  lr {rate:.6g}", flush=True)
        if tests is not None and done % config.test_interval == 0:
            tests.report(done, network_blobs(net))
        if config.snapshot and done % config.snapshot == 0:
            write_snapshot(net, optimiser, config)
    if config.snapshot_after_train and not (config.snapshot and optimiser.iteration % config.snapshot == 0):
        write_snapshot(net, optimiser, config)
    return 0


def write_snapshot(net: CaffeNetwork, optimiser: SolverOptimiser, config: SolverConfig) -> None:
    """Write PREFIX_iter_N.caffemodel and .solverstate."""
    from lockstep.interop.caffe.writer import save_caffemodel, save_state

    stem = f"{config.snapshot_prefix}_iter_{optimiser.iteration}"
    save_caffemodel(net, f"{stem}.caffemodel")
    steps = sum(optimiser.iteration > value for value in config.stepvalue)
    if config.lr_policy == "step":
        steps = max(optimiser.iteration - 1, 0) // config.stepsize
    save_state(
        f"{stem}.solverstate",
        iteration=optimiser.iteration,
        weights=f"{stem}.caffemodel",
        history=optimiser.history,
        current_step=steps,
    )
    print(f"wrote {stem}.caffemodel and .solverstate", flush=True)


def load_matching(net: CaffeNetwork, weights: dict[str, Blobs], path: Path) -> None:
    """Copy the blobs of layers that have the same name, as Caffe does to fine-tune, and say which were left.

    Raises:
        InputError: no layer has the name of one in the file, or shapes differ.
    """
    from lockstep.interop.caffe.graph import WEIGHTED, blob_names

    copied, left = [], []
    for step in net.steps:
        if step.spec.type not in WEIGHTED:
            continue
        blobs = weights.get(step.spec.name)
        if not blobs:
            left.append(step.spec.name)
            continue
        module = net.layers[step.key]
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        names = blob_names(module)
        if len(names) != len(blobs) or any(own[n].numel() != b.size for n, b in zip(names, blobs, strict=False)):
            raise InputError(
                f"{path}: layer {step.spec.name!r} has blobs {[b.shape for b in blobs]}; the net's are "
                f"{[tuple(own[n].shape) for n in names]}",
                field="weights",
            )
        with torch.no_grad():
            for name, blob in zip(names, blobs, strict=True):
                own[name].copy_(torch.from_numpy(blob.astype("float32")).reshape(own[name].shape))
        copied.append(step.spec.name)
    if not copied:
        raise InputError(f"{path} has none of the net's layers; it has {list(weights)[:8]}", field="weights")
    print(f"{path}: layers {', '.join(copied)}" + (f"; not in it, so from fillers: {', '.join(left)}" if left else ""))


class _Tests:
    """The solver's test net, run with the training net's weights."""

    def __init__(self, spec: NetSpec, data: Path | None, config: SolverConfig, device: torch.device) -> None:
        self.spec = spec
        self.source = _source(spec, data, config.seed)
        self.device = device
        self.iterations = config.test_iter[0] if config.test_iter else 1

    def report(self, iteration: int, blobs: dict[str, Blobs]) -> None:
        scores = evaluate(self.spec, blobs, self.source, self.iterations, self.device)
        shown = "  ".join(f"{name} {value:.6g}" for name, value in scores.items())
        print(f"iteration {iteration}  test {shown}", flush=True)


def evaluate(
    spec: NetSpec, blobs: dict[str, Blobs], source: DataSource, iterations: int, device: torch.device
) -> dict[str, float]:
    """Means of a net's outputs over batches, and its loss.

    Raises:
        FormatError: the weights are not of this net.
    """
    from lockstep.interop.caffe.graph import CaffeNetwork

    net = CaffeNetwork(spec, blobs, shapes=source.shapes, with_loss=True).eval().to(device)
    totals: dict[str, float] = {}
    batches = _on(device, source.batches())
    with torch.no_grad():
        for _ in range(iterations):
            values = net.compute(next(batches))
            for name in net.output_names:
                totals[name] = totals.get(name, 0.0) + float(values[name].mean()) / iterations
    return totals


def _time_main(args: list[str]) -> int:
    wish = tyro.cli(TimeArgs, args=args, prog="lockstep caffe time")
    from lockstep.interop.caffe.graph import load_caffe

    if wish.iterations < 1:
        raise ConfigError(f"--iterations {wish.iterations} must be at least 1")
    device = choose_device(wish.device)
    net = load_caffe(wish.model, wish.weights).to(device)
    inputs = {name: torch.randn(shape, device=device) for name, shape in net.input_shapes.items()}
    spent = dict.fromkeys((step.key for step in net.steps), 0.0)
    totals = [0.0, 0.0]
    for _ in range(wish.iterations):
        blobs = dict(inputs)
        for step in net.steps:
            start = _now(device)
            out = net.layers[step.key](*[blobs[name] for name in step.bottoms])
            spent[step.key] += _now(device) - start
            blobs |= dict(zip(step.tops, (out,) if isinstance(out, Tensor) else out, strict=True))
        start = _now(device)
        blobs = net.compute(inputs)
        middle = _now(device)
        net.zero_grad(set_to_none=True)
        torch.stack([blobs[name].sum() for name in net.output_names]).sum().backward()  # type: ignore[no-untyped-call]
        totals = [totals[0] + middle - start, totals[1] + _now(device) - middle]
    for step in net.steps:
        print(f"{step.spec.name:<24} {step.spec.type:<16} forward {1e3 * spent[step.key] / wish.iterations:9.3f} ms")
    print(f"{'whole net':<41} forward {1e3 * totals[0] / wish.iterations:9.3f} ms")
    print(f"{'':<41} backward {1e3 * totals[1] / wish.iterations:8.3f} ms")
    return 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def choose_device(name: str) -> torch.device:
    """A device by name, if it is there.

    Raises:
        ConfigError: it is not.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is not a device; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{name} is asked for and there is no CUDA device; set solver_mode: CPU or give --device cpu")
    return device


def _source(spec: NetSpec, data: Path | None, seed: int) -> DataSource:
    from lockstep.interop.caffe.data import DataSource, read_arrays

    source = DataSource(spec, None if data is None else read_arrays(data), seed=seed)
    if source.missing:
        raise InputError(
            f"{spec.path}: inputs {list(source.missing)} have no data; give --data with an .npz that holds rows for them",
            field="data",
        )
    return source


def _on(device: torch.device, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        yield {name: value.to(device) for name, value in batch.items()}


def _beside(snapshot: Path, name: str) -> Path:
    """The weights that a solver's state names: as it says, or in the same folder."""
    return Path(name) if Path(name).is_file() else snapshot.parent / Path(name).name
