"""Recurrent cells: fast against naive, forward and gradient, and the exactness contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import InputError

HIDDEN = (1, 3, 9, 17, 64, 65)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def cell_inputs(kind: str, num: int, hidden: int) -> list[Tensor]:
    if kind == "lstm":
        return [leaf(num, 4 * hidden), leaf(num, hidden)]
    return [leaf(num, 3 * hidden), leaf(num, 3 * hidden), leaf(num, hidden)]


def sequence_inputs(kind: str, steps: int, num: int, hidden: int) -> list[Tensor]:
    gates = 4 if kind == "lstm" else 3
    inputs = [leaf(steps, num, gates * hidden), leaf(hidden, gates * hidden), leaf(gates * hidden), leaf(num, hidden)]
    return [*inputs, leaf(num, hidden)] if kind == "lstm" else inputs


CELLS = {"lstm": kernels.lstm_gates, "gru": lambda *x: (kernels.gru_gates(*x),)}
SEQUENCES = {"lstm": kernels.lstm_sequence, "gru": lambda *x: (kernels.gru_sequence(*x),)}


def with_gradients(mode: str, function, inputs: list[Tensor], *constants: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    with kernels.force(mode):
        outs = function(*inputs, *constants)
        total = sum((y * torch.linspace(-1.0, 2.0, y.numel()).view_as(y)).sum() for y in outs)
        return [*outs, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("mode", ["naive", "opaque", "traceable"])
def test_cell_equals_its_twins(kind: str, hidden: int, mode: str) -> None:
    inputs = cell_inputs(kind, 7, hidden)
    if mode == "opaque":
        with kernels.force("opaque"), torch.no_grad():
            slow = list(CELLS[kind](*inputs))
    else:
        slow = with_gradients(mode, CELLS[kind], inputs)
    for a, b in zip(with_gradients("auto", CELLS[kind], inputs), slow, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize(("steps", "num", "hidden"), [(1, 1, 1), (5, 7, 9), (3, 63, 17), (6, 100, 64)])
def test_sequence_equals_naive(kind: str, steps: int, num: int, hidden: int) -> None:
    inputs = sequence_inputs(kind, steps, num, hidden)
    starts = torch.rand(steps, num) < 0.3
    fast = with_gradients("auto", SEQUENCES[kind], inputs, starts)
    for a, b in zip(fast, with_gradients("naive", SEQUENCES[kind], inputs, starts), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * float(b.detach().abs().max()) + 1e-6)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_cell_gradient_matches_finite_differences(kind: str) -> None:
    inputs = [x.detach().double().requires_grad_() for x in cell_inputs(kind, 3, 2)]
    assert torch.autograd.gradcheck(CELLS[kind], inputs)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_rows_and_steps_do_not_depend_on_their_company(kind: str, hidden: int) -> None:
    """A row alone, one step at a time, with the ops of one step: the bits of the whole batch's sequence."""
    inputs = [x.detach() for x in sequence_inputs(kind, 4, 33, hidden)]
    starts = torch.rand(4, 33) < 0.3
    whole = SEQUENCES[kind](*inputs, starts)
    pre, weight, bias, h, *cell = inputs
    for row in (0, 5, 32):
        state = [x[row : row + 1] for x in (h, *cell)]
        for t in range(4):
            state = [x.masked_fill(starts[t, row], 0.0) for x in state]
            product, now = kernels.linear(state[0], weight, bias), pre[t, row : row + 1]
            if kind == "lstm":
                state = list(kernels.lstm_gates(product + now, state[1]))
            else:
                state = [kernels.gru_gates(now, product, state[0])]
            assert torch.equal(whole[0][t, row], state[0][0])
        if kind == "lstm":
            assert torch.equal(whole[1][row], state[1][0])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_threads_change_nothing(kind: str) -> None:
    inputs = sequence_inputs(kind, 8, 200, 33)
    starts = torch.rand(8, 200) < 0.1
    one = with_gradients("auto", SEQUENCES[kind], inputs, starts)
    kernels.set_num_threads(2)
    try:
        two = with_gradients("auto", SEQUENCES[kind], inputs, starts)
    finally:
        kernels.set_num_threads(1)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_errors_name_the_part() -> None:
    with pytest.raises(InputError, match="pre is"):
        kernels.lstm_gates(torch.zeros(2, 11), torch.zeros(2, 3))
    with pytest.raises(InputError, match="re is"):
        kernels.gru_gates(torch.zeros(2, 9), torch.zeros(2, 8), torch.zeros(2, 3))
    inputs = [x.detach() for x in sequence_inputs("gru", 4, 2, 3)]
    with pytest.raises(InputError, match="starts is"):
        kernels.gru_sequence(*inputs, torch.zeros(4, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="weight and bias"):
        kernels.gru_sequence(inputs[0], inputs[1][:2], *inputs[2:], torch.zeros(4, 2, dtype=torch.bool))
