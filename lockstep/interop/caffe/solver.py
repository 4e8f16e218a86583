"""`solver.prototxt` as a configuration, and Caffe's update rules.

The rules follow Caffe where it differs from torch.optim: the learning rate enters the momentum's history (SGD, Nesterov),
decay is added to the gradient before every rule, RMSProp and AdaGrad take no momentum, Adam adds its epsilon to the square
root before the correction.

Sources: SGD and Nesterov (Sutskever et al. 2013), AdaGrad (Duchi et al. 2011), AdaDelta (Zeiler 2012), RMSProp (Tieleman and
Hinton 2012), Adam (Kingma and Ba 2015), with the constants of Caffe's solver documentation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lockstep.core.errors import CheckpointError, FormatError, unknown_name
from lockstep.interop.caffe.graph import Learnable
from lockstep.interop.caffe.reader import NetSpec, Phase, net_from_message, read_net
from lockstep.interop.caffe.text import Message, read_text

SOLVERS = ("SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam")
_OLD_SOLVERS = ("SGD", "NESTEROV", "ADAGRAD", "RMSPROP", "ADADELTA", "ADAM")
POLICIES = ("fixed", "step", "exp", "inv", "multistep", "poly", "sigmoid")
_FIELDS = [
    "net",
    "net_param",
    "train_net",
    "test_net",
    "train_net_param",
    "test_net_param",
    "train_state",
    "test_state",
    "test_iter",
    "test_interval",
    "test_compute_loss",
    "test_initialization",
    "base_lr",
    "display",
    "average_loss",
    "max_iter",
    "iter_size",
    "lr_policy",
    "gamma",
    "power",
    "momentum",
    "weight_decay",
    "regularization_type",
    "stepsize",
    "stepvalue",
    "clip_gradients",
    "snapshot",
    "snapshot_prefix",
    "snapshot_diff",
    "snapshot_format",
    "solver_mode",
    "device_id",
    "random_seed",
    "type",
    "delta",
    "momentum2",
    "rms_decay",
    "debug_info",
    "snapshot_after_train",
    "solver_type",
    "layer_wise_reduce",
    "weights",
]


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """Settings of a solver; defaults are Caffe's."""

    type: str = "SGD"
    """One of `SOLVERS`."""
    base_lr: float = 0.01
    """Learning rate before the policy and each blob's `lr_mult`."""
    lr_policy: str = "fixed"
    """One of `POLICIES`."""
    gamma: float = 0.0
    """Base of step, exp and multistep; rate of inv and sigmoid."""
    power: float = 0.0
    """Exponent of inv and poly."""
    stepsize: int = 0
    """Iterations between steps; centre of sigmoid."""
    stepvalue: tuple[int, ...] = ()
    """Iterations at which multistep steps."""
    max_iter: int = 0
    """Iterations in all; where poly reaches zero."""
    momentum: float = 0.0
    """Of SGD and Nesterov; first moment of Adam; decay of AdaDelta."""
    momentum2: float = 0.999
    """Second moment of Adam."""
    rms_decay: float = 0.99
    """Of RMSProp."""
    delta: float = 1e-8
    """Keeps divisions finite."""
    weight_decay: float = 0.0
    """Times each blob's `decay_mult`, added to the gradient."""
    regularization_type: str = "L2"
    """L2 or L1."""
    clip_gradients: float = -1.0
    """Largest norm of the whole gradient; negative: none."""
    iter_size: int = 1
    """Batches whose gradients are averaged for one update."""
    display: int = 0
    """Iterations between reports; 0: none."""
    average_loss: int = 1
    """Losses averaged in a report."""
    test_iter: tuple[int, ...] = ()
    """Batches of a test, for each test net."""
    test_interval: int = 0
    """Iterations between tests; 0: none."""
    test_initialization: bool = True
    """Test before the first iteration too."""
    snapshot: int = 0
    """Iterations between snapshots; 0: none."""
    snapshot_prefix: str = ""
    """Path that snapshot names start with."""
    snapshot_after_train: bool = True
    """Also after the last iteration."""
    solver_mode: str = "GPU"
    """CPU or GPU."""
    device_id: int = 0
    """GPU number."""
    random_seed: int = -1
    """Seed of fillers and generated data; -1: 0 here."""
    weights: tuple[str, ...] = ()
    """Files to start from."""

    @property
    def seed(self) -> int:
        """A seed that is never left to the clock."""
        return max(self.random_seed, 0)


@dataclass(frozen=True)
class SolverFile:
    """A solver's settings with the networks it names."""

    config: SolverConfig
    message: Message
    path: Path

    def net(self, phase: Phase, model: Path | None = None) -> NetSpec:
        """The training net, or the first test net.

        Args:
            phase: TRAIN or TEST.
            model: a file to read instead of the one the solver names.

        Raises:
            FormatError: the net is missing or damaged.
        """
        state = self.message.message("train_state" if phase == "TRAIN" else "test_state")
        level, stages = state.integer("level", 0), tuple(state.strings("stage"))
        inline = f"{phase.lower()}_net_param"
        for name in (inline, "net_param"):
            if model is None and name in self.message:
                return net_from_message(self.message.messages(name)[0], phase=phase, level=level, stages=stages)
        named = self.message.strings(f"{phase.lower()}_net") or self.message.strings("net")
        if model is None and not named:
            raise FormatError(f"names no net for phase {phase}", path=str(self.path))
        return read_net(model or self._find(named[0]), phase=phase, level=level, stages=stages)

    def _find(self, name: str) -> Path:
        for path in (Path(name), self.path.parent / name):
            if path.is_file():
                return path
        beside = self.path.parent / Path(name).name
        hint = f"; {beside} exists: give it with --model" if beside.is_file() else "; give the net with --model"
        raise FormatError(f"names the net {name!r}, which does not exist{hint}", path=str(self.path))


def read_solver(path: str | Path) -> SolverFile:
    """Read a `solver.prototxt`.

    Raises:
        FormatError: it is missing or damaged, or a setting is unknown or out of range; names file and line.
    """
    message = read_text(path)
    message.where = "solver"
    message.known(_FIELDS)
    kind = message.string("type", "SGD")
    if "solver_type" in message:
        kind = SOLVERS[_OLD_SOLVERS.index(message.enum("solver_type", _OLD_SOLVERS, "SGD"))]
    policy = message.string("lr_policy", "fixed")
    for what, got, known in (("solver type", kind, SOLVERS), ("lr_policy", policy, POLICIES)):
        if got not in known:
            raise message.fail(unknown_name(what, got, known))
    if message.enum("snapshot_format", ("HDF5", "BINARYPROTO"), "BINARYPROTO") == "HDF5":
        raise message.fail("snapshot_format: HDF5 is not written; use BINARYPROTO")
    config = SolverConfig(
        type=kind,
        lr_policy=policy,
        base_lr=message.real("base_lr", 0.01),
        gamma=message.real("gamma", 0.0),
        power=message.real("power", 0.0),
        stepsize=message.integer("stepsize", 0),
        stepvalue=tuple(message.integers("stepvalue")),
        max_iter=message.integer("max_iter", 0),
        momentum=message.real("momentum", 0.0),
        momentum2=message.real("momentum2", 0.999),
        rms_decay=message.real("rms_decay", 0.99),
        delta=message.real("delta", 1e-8),
        weight_decay=message.real("weight_decay", 0.0),
        regularization_type=message.string("regularization_type", "L2"),
        clip_gradients=message.real("clip_gradients", -1.0),
        iter_size=message.integer("iter_size", 1),
        display=message.integer("display", 0),
        average_loss=message.integer("average_loss", 1),
        test_iter=tuple(message.integers("test_iter")),
        test_interval=message.integer("test_interval", 0),
        test_initialization=message.flag("test_initialization", True),
        snapshot=message.integer("snapshot", 0),
        snapshot_prefix=message.string("snapshot_prefix"),
        snapshot_after_train=message.flag("snapshot_after_train", True),
        solver_mode=message.enum("solver_mode", ("CPU", "GPU"), "GPU"),
        device_id=message.integer("device_id", 0),
        random_seed=message.integer("random_seed", -1),
        weights=tuple(name for value in message.strings("weights") for name in value.split(",")),
    )
    _check(config, message)
    return SolverFile(config, message, Path(path))


def _check(config: SolverConfig, message: Message) -> None:
    if config.regularization_type not in ("L2", "L1"):
        raise message.fail(f"regularization_type: {config.regularization_type!r} should be L2 or L1")
    if config.lr_policy in ("step", "sigmoid") and config.stepsize < 1:
        raise message.fail(f"lr_policy: {config.lr_policy} needs a positive stepsize")
    if config.lr_policy not in ("fixed", "poly") and config.gamma < 0:
        raise message.fail(f"gamma: {config.gamma} must not be negative")
    if config.lr_policy == "poly" and config.max_iter < 1:
        raise message.fail("lr_policy: poly needs a positive max_iter")
    if config.iter_size < 1 or config.average_loss < 1:
        raise message.fail("iter_size and average_loss must be at least 1")
    if config.type in ("AdaGrad", "RMSProp") and config.momentum:
        raise message.fail(f"momentum: {config.momentum} cannot be used with {config.type}")


def learning_rate(config: SolverConfig, iteration: int) -> float:
    """The rate of one iteration (the first is 0), before multipliers.

    >>> [learning_rate(SolverConfig(base_lr=1.0, lr_policy="step", gamma=0.5, stepsize=2), n) for n in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    base, gamma = config.base_lr, config.gamma
    match config.lr_policy:
        case "step":
            return base * gamma ** (iteration // config.stepsize)
        case "exp":
            return base * gamma**iteration
        case "inv":
            return base * (1 + gamma * iteration) ** -config.power
        case "multistep":
            return base * gamma ** sum(iteration >= value for value in config.stepvalue)
        case "poly":
            return base * (1 - iteration / config.max_iter) ** config.power
        case "sigmoid":
            return base / (1 + math.exp(min(-gamma * (iteration - config.stepsize), 700.0)))
        case _:
            return base


class SolverOptimiser:
    """Caffe's update of a network's blobs, one `step` for each `iter_size` backward passes.

    Args:
        learnables: blobs with their multipliers (`CaffeNetwork.learnables()`).
        config: the solver's settings.
    """

    def __init__(self, learnables: Sequence[Learnable], config: SolverConfig) -> None:
        self.learnables = tuple(learnables)
        self.config = config
        self.iteration = 0
        rounds = 2 if config.type in ("Adam", "AdaDelta") else 1
        self.history = [torch.zeros_like(item.parameter) for _ in range(rounds) for item in self.learnables]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for item in self.learnables:
            item.parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Clip, average, decay, update; then count the iteration."""
        config = self.config
        rate = learning_rate(config, self.iteration)
        gradients = [
            torch.zeros_like(item.parameter) if item.parameter.grad is None else item.parameter.grad
            for item in self.learnables
        ]
        if config.clip_gradients >= 0:
            norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
            scale = (config.clip_gradients / norm.clamp(min=1e-38)).clamp(max=1.0)
            gradients = [gradient * scale for gradient in gradients]
        for index, (item, gradient) in enumerate(zip(self.learnables, gradients, strict=True)):
            if config.iter_size > 1:
                gradient = gradient / config.iter_size
            decay = config.weight_decay * item.spec.decay_mult
            if decay:
                weights = item.parameter
                gradient = gradient + decay * (weights if config.regularization_type == "L2" else weights.sign())
            item.parameter.sub_(self._update(index, gradient, rate * item.spec.lr_mult))
        self.iteration += 1

    def _update(self, index: int, gradient: Tensor, rate: float) -> Tensor:
        config, first = self.config, self.history[index]
        match config.type:
            case "SGD":
                return first.mul_(config.momentum).add_(gradient, alpha=rate)
            case "Nesterov":
                before = first.clone()
                first.mul_(config.momentum).add_(gradient, alpha=rate)
                return (1 + config.momentum) * first - config.momentum * before
            case "AdaGrad":
                first.add_(gradient.square())
                return rate * gradient / (first.sqrt() + config.delta)
            case "RMSProp":
                first.mul_(config.rms_decay).add_(gradient.square(), alpha=1 - config.rms_decay)
                return rate * (gradient / (first.sqrt() + config.delta))
        second = self.history[len(self.learnables) + index]
        if config.type == "AdaDelta":
            first.mul_(config.momentum).add_(gradient.square(), alpha=1 - config.momentum)
            update = gradient * ((config.delta + second) / (config.delta + first)).sqrt()
            second.mul_(config.momentum).add_(update.square(), alpha=1 - config.momentum)
            return rate * update
        step = self.iteration + 1
        correction = math.sqrt(1 - config.momentum2**step) / (1 - config.momentum**step)
        first.mul_(config.momentum).add_(gradient, alpha=1 - config.momentum)
        second.mul_(config.momentum2).add_(gradient.square(), alpha=1 - config.momentum2)
        return rate * correction * (first / (second.sqrt() + config.delta))

    def restore(self, iteration: int, history: Sequence[Tensor]) -> None:
        """Go on from a snapshot.

        Raises:
            CheckpointError: it belongs to another network or solver.
        """
        got, expected = [tuple(value.shape) for value in history], [tuple(value.shape) for value in self.history]
        if got != expected:
            raise CheckpointError(
                f"the snapshot's history has shapes {got[:4]}..., this solver's {expected[:4]}...; "
                "is it of this network and solver type?"
            )
        self.iteration = iteration
        for mine, value in zip(self.history, history, strict=True):
            mine.copy_(value)
