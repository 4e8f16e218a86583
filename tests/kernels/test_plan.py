"""The fused act has the bits of the composed ops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels.plan import naive

HEADS = {
    "categorical": kernels.Head("categorical"),
    "multi": kernels.Head("categorical", nvec=(2, 4)),
    "gaussian": kernels.Head("gaussian", log_std=torch.linspace(-1, 0.5, 6)),
    "squashed": kernels.Head("squashed", log_std_min=-1.0, log_std_max=0.5),
    "tanh": kernels.Head("tanh"),
    "argmax": kernels.Head("argmax", epsilon=0.4),
}
NORMALISER = kernels.Normaliser(torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5), 1.5)


def net(*sizes: int, output: str = "none", dtype: str = "fp32") -> kernels.Net:
    weights = [torch.nn.Parameter(torch.randn(a, b) / a**0.5) for a, b in itertools.pairwise(sizes)]
    biases = [torch.nn.Parameter(torch.randn(b)) for b in sizes[1:]]
    return kernels.Net(weights, biases, "tanh", output, dtype)


def equal(plan: kernels.ActPlan, composed: dict[str, Tensor]) -> None:
    for name, tensor in composed.items():
        got = torch.from_numpy(plan.__dict__[name])
        assert torch.equal(got, tensor), name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 2, 17, 63])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_equals_composed_ops(head: str, rows: int, deterministic: bool, dtype: str) -> None:
    actor = net(5, 64, 33, 6, output="tanh" if head == "tanh" else "none", dtype=dtype)
    critic = net(5, 16, 1, dtype=dtype)
    plan = kernels.ActPlan(actor, HEADS[head], rows, critic, NORMALISER)
    obs = torch.randn(rows, 5)
    stream, position = torch.randint(0, 1000, (rows,)), torch.randint(0, 1000, (rows,))
    plan.run(obs.numpy(), 7, stream.numpy(), position.numpy(), deterministic)
    composed = naive.act(obs, actor, HEADS[head], critic, NORMALISER, 7, stream, position, deterministic)
    equal(plan, composed)
    with kernels.force("naive"):
        plan.run(obs.numpy(), 7, stream.numpy(), position.numpy(), deterministic)
    np.testing.assert_allclose(plan.value, composed["value"], rtol=2e-2, atol=2e-2)


def test_follows_parameters_in_place_and_moved() -> None:
    actor = net(5, 8, 6)
    plan = kernels.ActPlan(actor, HEADS["categorical"], 3)
    obs = torch.randn(3, 5)
    plan.run(obs.numpy(), deterministic=True)
    with torch.no_grad():
        actor.weights[0].mul_(2.0)
    actor.weights[1].data = actor.weights[1].data.clone() * 3.0
    plan.run(obs.numpy(), deterministic=True)
    assert torch.equal(torch.from_numpy(plan.head_input), naive.apply(actor, obs))


def test_reads_an_address_in_place() -> None:
    actor = net(5, 8, 6)
    plan = kernels.ActPlan(actor, HEADS["categorical"], 3)
    obs = torch.randn(3, 5)
    for mode in ("auto", "naive"):
        with kernels.force(mode):
            plan.run(obs.data_ptr(), deterministic=True)
        assert torch.equal(torch.from_numpy(plan.features), obs)


def test_epsilon_can_change() -> None:
    plan = kernels.ActPlan(net(5, 8, 4), HEADS["argmax"], 400)
    plan.run(np.zeros((400, 5), np.float32), deterministic=True)
    best = int(plan.choices[0, 0])
    plan.set_epsilon(0.0)
    assert (plan.run(seed=1).choices == best).all()
    plan.set_epsilon(1.0)
    counts = np.bincount(plan.run(seed=1).choices[:, 0], minlength=4)
    assert counts.min() > 60


def test_errors() -> None:
    with pytest.raises(InputError, match="even"):
        kernels.ActPlan(net(5, 3), HEADS["squashed"], 1)
    with pytest.raises(InputError, match="nvec"):
        kernels.ActPlan(net(5, 3), HEADS["multi"], 1)
    with pytest.raises(InputError, match="log_std"):
        kernels.ActPlan(net(5, 3), kernels.Head("gaussian"), 1)
    with pytest.raises(InputError, match="critic"):
        kernels.ActPlan(net(5, 3), HEADS["tanh"], 1, critic=net(5, 2))
    with pytest.raises(ConfigError, match="did you mean 'argmax'"):
        kernels.ActPlan(net(5, 3), kernels.Head("argmx"), 1)  # type: ignore[arg-type]
