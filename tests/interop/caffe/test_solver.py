"""`solver.prototxt` against weights and losses that the real solver left along 20 steps."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.core.errors import CheckpointError, FormatError
from lockstep.interop.caffe.graph import CaffeNetwork
from lockstep.interop.caffe.reader import net_from_message, read_weights
from lockstep.interop.caffe.solver import SolverConfig, SolverOptimiser, learning_rate, read_solver
from lockstep.interop.caffe.text import parse_text
from lockstep.interop.caffe.writer import read_state, save_state
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks" / "caffe"
# What the records were made with, found from them: losses of every step fix the rate, momentum and multipliers.
SETTINGS = {
    "SGD": "base_lr: 0.01 momentum: 0.9 weight_decay: 0.001",
    "Adam": "base_lr: 0.01 momentum: 0.9",
    "RMSProp": "base_lr: 0.01 rms_decay: 0.95 delta: 1e-6",
}
NET = """
layer { name: "obs" type: "Input" top: "obs" input_param { shape { dim: 32 dim: 4 } } }
layer { name: "target" type: "Input" top: "target" input_param { shape { dim: 32 dim: 2 } } }
layer { name: "fc1" type: "InnerProduct" bottom: "obs" top: "fc1" param { lr_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
        inner_product_param { num_output: 32 weight_filler { type: "xavier" } } }
layer { name: "r1" type: "ReLU" bottom: "fc1" top: "fc1" }
layer { name: "q" type: "InnerProduct" bottom: "fc1" top: "q"
        inner_product_param { num_output: 2 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "q" bottom: "target" top: "loss" }
"""


def _solver(tmp_path: Path, text: str) -> SolverConfig:
    (tmp_path / "solver.prototxt").write_text(
        f'net: "net.prototxt" lr_policy: "fixed" max_iter: 20 solver_mode: CPU {text}'
    )
    return read_solver(tmp_path / "solver.prototxt").config


def _net() -> CaffeNetwork:
    return CaffeNetwork(net_from_message(parse_text(NET), phase="TRAIN"), with_loss=True)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "RMSProp"])
def test_follows_the_real_solver_for_20_steps(kind: str, tmp_path: Path) -> None:
    stored = arrays(FILES / f"solv_{kind}.npz")
    net = _net()
    for index, item in enumerate(net.learnables()):
        item.parameter.data.copy_(torch.from_numpy(stored[f"a{index}"]))
    optimiser = SolverOptimiser(net.learnables(), _solver(tmp_path, f'type: "{kind}" {SETTINGS[kind]}'))
    for step in range(20):
        optimiser.zero_grad()
        loss, _ = net.loss({"obs": torch.from_numpy(stored["X"][step]), "target": torch.from_numpy(stored["Y"][step])})
        assert float(loss.detach()) == pytest.approx(float(stored["L"][step]), rel=1e-5), step
        loss.backward()
        optimiser.step()
    for index, item in enumerate(net.learnables()):
        assert np.abs(item.parameter.detach().numpy() - stored[f"b{index}"]).max() <= 1e-5, item.name


def test_the_real_solvers_snapshot_loads() -> None:
    blobs = read_weights(FILES / "q_iter_20.caffemodel")
    assert {name: [blob.shape for blob in layer] for name, layer in blobs.items() if layer} == {
        "fc1": [(32, 4), (32,)],
        "q": [(2, 32), (2,)],
    }
    net = CaffeNetwork(net_from_message(parse_text(NET), phase="TRAIN"), blobs, with_loss=True)
    assert np.array_equal(net.layers["fc1"].weight.detach().numpy(), blobs["fc1"][0])


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"lr_policy": "fixed"}, [0.5, 0.5, 0.5, 0.5]),
        ({"lr_policy": "step", "gamma": 0.1, "stepsize": 2}, [0.5, 0.5, 0.05, 0.05]),
        ({"lr_policy": "exp", "gamma": 0.5}, [0.5, 0.25, 0.125, 0.0625]),
        ({"lr_policy": "inv", "gamma": 1.0, "power": 0.5}, [0.5, 0.5 / 2**0.5, 0.5 / 3**0.5, 0.25]),
        ({"lr_policy": "multistep", "gamma": 0.1, "stepvalue": (1, 3)}, [0.5, 0.05, 0.05, 0.005]),
        ({"lr_policy": "poly", "power": 2.0, "max_iter": 4}, [0.5, 0.28125, 0.125, 0.03125]),
        ({"lr_policy": "sigmoid", "gamma": -1.0, "stepsize": 2}, [0.5 / (1 + math.exp(n - 2)) for n in range(4)]),
    ],
)
def test_learning_rate_policies(settings: dict[str, object], rates: list[float]) -> None:
    config = SolverConfig(base_lr=0.5, **settings)  # type: ignore[arg-type]
    assert [learning_rate(config, n) for n in range(4)] == pytest.approx(rates)


def _formulas(kind: str, w: np.ndarray, g: np.ndarray, state: list[np.ndarray], lr: float) -> np.ndarray:
    """The update in NumPy, from the papers, in double precision."""
    m = 0.9
    if kind == "Nesterov":
        before = state[0].copy()
        state[0] = m * state[0] + lr * g
        return w - ((1 + m) * state[0] - m * before)
    if kind == "AdaGrad":
        state[0] = state[0] + g * g
        return w - lr * g / (np.sqrt(state[0]) + 1e-4)
    state[0] = m * state[0] + (1 - m) * g * g
    step = g * np.sqrt((state[1] + 1e-4) / (state[0] + 1e-4))
    state[1] = m * state[1] + (1 - m) * step * step
    return w - lr * step


@pytest.mark.parametrize("kind", ["Nesterov", "AdaGrad", "AdaDelta"])
def test_other_rules_with_clipping_decay_and_accumulation(kind: str, tmp_path: Path) -> None:
    momentum = "" if kind == "AdaGrad" else "momentum: 0.9"
    config = _solver(
        tmp_path,
        f'type: "{kind}" base_lr: 0.1 {momentum} delta: 1e-4 weight_decay: 0.01 clip_gradients: 0.5 iter_size: 2',
    )
    net = _net()
    learnables = net.learnables()
    optimiser = SolverOptimiser(learnables, config)
    expected = [item.parameter.detach().double().numpy().copy() for item in learnables]
    states = [[np.zeros_like(w), np.zeros_like(w)] for w in expected]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        optimiser.zero_grad()
        for _ in range(2):
            batch = {
                "obs": torch.randn(32, 4, generator=generator),
                "target": torch.randn(32, 2, generator=generator) * 9,
            }
            net.loss(batch)[0].backward()
        gradients = [item.parameter.grad.double().numpy() for item in learnables if item.parameter.grad is not None]
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        assert norm > 0.5
        for index, (item, g) in enumerate(zip(learnables, gradients, strict=True)):
            g = g * 0.5 / norm / 2 + 0.01 * item.spec.decay_mult * expected[index]
            expected[index] = _formulas(kind, expected[index], g, states[index], 0.1 * item.spec.lr_mult)
        optimiser.step()
    for item, value in zip(learnables, expected, strict=True):
        assert np.abs(item.parameter.detach().numpy() - value).max() <= 1e-5, item.name


def test_a_snapshot_resumes(tmp_path: Path) -> None:
    config = _solver(tmp_path, 'type: "Adam" base_lr: 0.01 momentum: 0.9')
    batch = {"obs": torch.randn(32, 4), "target": torch.randn(32, 2)}

    def advance(net: CaffeNetwork, optimiser: SolverOptimiser) -> None:
        optimiser.zero_grad()
        net.loss(batch)[0].backward()
        optimiser.step()

    net = _net()
    optimiser = SolverOptimiser(net.learnables(), config)
    for _ in range(3):
        advance(net, optimiser)
    save_state(tmp_path / "s.solverstate", iteration=3, weights="w", history=optimiser.history, current_step=0)
    other = _net()
    other.load_state_dict(net.state_dict())
    iteration, weights, history = read_state(tmp_path / "s.solverstate")
    resumed = SolverOptimiser(other.learnables(), config)
    resumed.restore(iteration, history)
    assert (iteration, weights) == (3, "w")
    advance(net, optimiser)
    advance(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="is it of this network and solver type"):
        SolverOptimiser(other.learnables(), _solver(tmp_path, 'type: "SGD"')).restore(iteration, history)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('type: "Adm"', "unknown solver type 'Adm'; did you mean 'Adam'"),
        ('lr_policy: "step"', "needs a positive stepsize"),
        ("momentun: 0.9", "unknown field 'momentun'; did you mean 'momentum'"),
        ('type: "RMSProp" momentum: 0.9', "cannot be used with RMSProp"),
        ("base_lr: fast", "line 1: solver: base_lr: 'fast' is not a number"),
    ],
)
def test_a_bad_solver_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        _solver(tmp_path, text)
