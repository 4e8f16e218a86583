"""Categorical and normal heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import InputError

ROWS = (1, 2, 63, 64, 1000)


def uniforms(rows: int, width: int, seed: int = 1) -> Tensor:
    return kernels.uniform(seed, torch.arange(rows), torch.zeros(rows, dtype=torch.int64), width)


def gradients(mode: str, function, inputs: list[Tensor], *rest: object) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Outputs and the gradient of a fixed combination of them."""
    with kernels.force(mode):
        outputs = function(*inputs, *rest)
        loss = sum((o * torch.linspace(-1, 1.5, o.numel()).view_as(o)).sum() for o in outputs)
        return [*outputs, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("nvec", [(1,), (2,), (17,), (3, 2, 5)])
def test_categorical_equals_naive(rows: int, nvec: tuple[int, ...]) -> None:
    logits = (torch.randn(rows, sum(nvec)) * 3).requires_grad_()
    actions = torch.stack([torch.randint(0, n, (rows,)) for n in nvec], 1)
    fast = gradients("auto", kernels.categorical_evaluate, [logits], actions, nvec)
    slow = gradients("naive", kernels.categorical_evaluate, [logits], actions, nvec)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)
    noise = uniforms(rows, sum(nvec))
    drawn, logprob = kernels.categorical_sample(logits, noise, nvec)
    with kernels.force("naive"):
        drawn_naive, logprob_naive = kernels.categorical_sample(logits, noise, nvec)
    assert torch.equal(drawn, drawn_naive)
    torch.testing.assert_close(logprob, logprob_naive, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["auto", "naive"])
@pytest.mark.parametrize("nvec", [(6,), (4, 3)])
def test_sampler_and_learner_agree_bit_for_bit(mode: str, nvec: tuple[int, ...]) -> None:
    logits = torch.randn(100, sum(nvec)) * 2
    with kernels.force(mode):
        for noise in (uniforms(100, sum(nvec)), None):
            actions, logprob = kernels.categorical_sample(logits, noise, nvec)
            assert torch.equal(kernels.categorical_evaluate(logits, actions, nvec)[0], logprob)
            row_actions, row_logprob = kernels.categorical_sample(
                logits[37:38].clone(), None if noise is None else noise[37:38].clone(), nvec
            )
            assert torch.equal(row_actions[0], actions[37])
            assert torch.equal(row_logprob[0], logprob[37])


@pytest.mark.parametrize("mode", ["auto", "naive"])
@pytest.mark.parametrize("mask", [-1e8, -float("inf")])
def test_masked_choices(mode: str, mask: float) -> None:
    logits = torch.tensor([[0.5, mask, 1.0], [mask, mask, 2.0]], requires_grad=True)
    with kernels.force(mode):
        logprob, entropy = kernels.categorical_evaluate(logits, torch.tensor([2, 2]))
        (grad,) = torch.autograd.grad((logprob + entropy).sum(), [logits])
        drawn = [kernels.categorical_sample(logits, uniforms(2, 3, seed))[0] for seed in range(50)]
    two = torch.log_softmax(torch.tensor([0.5, 1.0]), 0)
    torch.testing.assert_close(logprob, torch.stack([two[1], torch.tensor(0.0)]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy[0], -(two.exp() * two).sum())
    assert float(entropy[1].detach()) == 0.0
    assert torch.isfinite(grad).all()
    assert float(grad[0, 1]) == 0.0
    assert {int(d[0]) for d in drawn} == {0, 2}
    assert {int(d[1]) for d in drawn} == {2}


def test_sampling_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.7])
    num = 20000
    actions, _ = kernels.categorical_sample(probabilities.log().expand(num, 3), uniforms(num, 3))
    share = torch.bincount(actions, minlength=3) / num
    # Four standard errors of a share are at most 4 * sqrt(0.25 / 20000) = 0.0141.
    torch.testing.assert_close(share, probabilities, rtol=0, atol=0.0141)


def test_mode_is_the_first_maximum() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    for mode in ("auto", "naive"):
        with kernels.force(mode):
            assert kernels.categorical_mode(logits)[0].tolist() == [1, 0]


@pytest.mark.parametrize("mode", ["naive"])
def test_naive_head_gradients_match_finite_differences(mode: str) -> None:
    with kernels.force(mode):
        logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        actions = torch.tensor([[0, 1], [2, 0], [1, 1]])
        assert torch.autograd.gradcheck(lambda x: kernels.categorical_evaluate(x, actions, (3, 2)), [logits])
        mean = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        log_std = torch.randn(2, dtype=torch.float64, requires_grad=True)
        values = torch.randn(3, 2, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda m, s: kernels.gaussian_evaluate(m, s, values), [mean, log_std])
        assert torch.autograd.gradcheck(lambda m, s: kernels.squashed_gaussian_sample(m, s, values), [mean, log_std])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 3, 17])
@pytest.mark.parametrize("shared", [True, False])
def test_gaussian_equals_naive(rows: int, width: int, shared: bool) -> None:
    mean = torch.randn(rows, width, requires_grad=True)
    log_std = (
        torch.randn(width if shared else rows * width).view(*(() if shared else (rows,)), width)
    ).requires_grad_()
    actions = torch.randn(rows, width)
    fast = gradients("auto", kernels.gaussian_evaluate, [mean, log_std], actions)
    slow = gradients("naive", kernels.gaussian_evaluate, [mean, log_std], actions)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max() + 1))
    for noise in (torch.randn(rows, width), None):
        drawn, logprob = kernels.gaussian_sample(mean, log_std, noise)
        assert torch.equal(kernels.gaussian_evaluate(mean, log_std, drawn)[0].detach(), logprob)
        with kernels.force("naive"):
            torch.testing.assert_close(drawn, kernels.gaussian_sample(mean, log_std, noise)[0])


@pytest.mark.parametrize("rows", ROWS)
def test_squashed_equals_naive(rows: int) -> None:
    mean = (torch.randn(rows, 3) * 2).requires_grad_()
    log_std = (torch.randn(rows, 3) - 1).requires_grad_()
    noise = torch.randn(rows, 3)
    fast = gradients("auto", kernels.squashed_gaussian_sample, [mean, log_std], noise)
    slow = gradients("naive", kernels.squashed_gaussian_sample, [mean, log_std], noise)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_squashed_stays_inside_and_finite(mode: str) -> None:
    mean = torch.tensor([[-50.0, 50.0, 0.0]], requires_grad=True)
    log_std = torch.full((1, 3), 2.0, requires_grad=True)
    with kernels.force(mode):
        actions, logprob = kernels.squashed_gaussian_sample(mean, log_std, torch.ones(1, 3))
        grads = torch.autograd.grad(logprob.sum() + actions.sum(), [mean, log_std])
    assert bool((actions.abs() < 1.0).all())
    assert torch.isfinite(logprob).all()
    assert all(torch.isfinite(g).all() for g in grads)


def test_errors() -> None:
    with pytest.raises(InputError, match="expected 0 <= action"):
        kernels.categorical_evaluate(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(InputError, match="nvec"):
        kernels.categorical_sample(torch.zeros(2, 3), None, (2, 2))
    with pytest.raises(InputError, match="log_std"):
        kernels.gaussian_sample(torch.zeros(2, 3), torch.zeros(2), None)


def test_squashed_head_is_the_sample_of_its_halves() -> None:
    params = (torch.randn(37, 6) * 3).requires_grad_()
    noise = torch.randn(37, 3)

    def halves(params: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = params.split(3, dim=1)
        return kernels.squashed_gaussian_sample(mean.contiguous(), log_std.clamp(-2.0, 1.0), noise)

    whole = gradients("auto", lambda p, n: kernels.squashed_gaussian_head(p, (-2.0, 1.0), n), [params], noise)
    for a, b in zip(whole, gradients("auto", halves, [params], noise), strict=True):
        assert torch.equal(a, b)
    naive = gradients("naive", lambda p, n: kernels.squashed_gaussian_head(p, (-2.0, 1.0), n), [params], noise)
    for a, b in zip(whole, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)
    with pytest.raises(InputError, match="37, 6"):
        kernels.squashed_gaussian_head(params[:, :5], (-2.0, 1.0), noise)
