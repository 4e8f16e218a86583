"""Log-probabilities: accuracy at a real vocabulary, twins, gradients, and the head that never holds all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import InputError
from lockstep.kernels.logprobs import head

VOCABS = (1, 2, 17, 63, 1000, 1024, 1025, 5000)


def exact(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).double().log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_every_level_equals_naive_with_gradients(level: int, temperature: float) -> None:
    for vocab in VOCABS:
        logits = (torch.randn(5, vocab) * 4).requires_grad_()
        with torch.no_grad():
            logits[:, vocab // 2 + 1 :: 3] = -torch.inf
        tokens = torch.randint(0, vocab // 2 + 1, (5,))
        results = []
        for mode in ("auto", "naive"):
            with kernels.force(mode):  # type: ignore[arg-type]
                y = kernels.token_logprobs(logits, tokens, temperature)
                results.append((y, *torch.autograd.grad((y * torch.arange(1.0, 6.0)).sum(), logits)))
        for fast, slow in zip(*results, strict=True):
            torch.testing.assert_close(fast, slow, rtol=2e-6, atol=2e-6)


def test_a_large_vocabulary_stays_accurate(level: int) -> None:
    logits = torch.randn(2, 151_936)
    logits[1] *= 8.0
    tokens = torch.tensor([151_935, int(logits[1].argmax())])
    error = (kernels.token_logprobs(logits, tokens).double() - exact(logits, tokens, 1.0)).abs()
    assert float(error.max()) < 1e-6  # the value itself is about 12, whose last place is 1e-6


def test_gradient_matches_finite_differences() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 6, 3])
    assert torch.autograd.gradcheck(lambda x: kernels.token_logprobs(x, tokens, 0.7), logits)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_a_row_depends_on_itself_alone(level: int, mode: str) -> None:
    logits, tokens = torch.randn(23, 3001), torch.randint(0, 3001, (23,))
    before = kernels.num_threads()
    with kernels.force(mode):  # type: ignore[arg-type]
        whole = kernels.token_logprobs(logits, tokens, 0.8)
        try:
            kernels.set_num_threads(2)
            for cut in (1, 9):
                parts = [
                    kernels.token_logprobs(a, t, 0.8) for a, t in zip(logits.split(cut), tokens.split(cut), strict=True)
                ]
                assert torch.equal(torch.cat(parts), whole)
        finally:
            kernels.set_num_threads(before)


def test_top_logprobs_on_every_level(level: int) -> None:
    for vocab, num in ((1, 1), (50, 50), (3000, 20), (3000, 1)):
        logits = torch.randint(-6, 6, (4, vocab)).float()  # many ties
        logits[:, ::5] = -torch.inf if vocab > 1 else 0.0
        ids, values = kernels.top_logprobs(logits, num)
        with kernels.force("naive"):
            naive_ids, naive_values = kernels.top_logprobs(logits, num)
        assert torch.equal(ids, naive_ids)
        torch.testing.assert_close(values, naive_values, rtol=1e-6, atol=1e-6)
        assert torch.equal(values[:, 0], kernels.token_logprobs(logits, ids[:, 0].contiguous()))


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_head_has_the_bits_of_the_whole_and_its_gradient(softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "FORWARD_ROWS", 4)
    monkeypatch.setattr(head, "BACKWARD_ROWS", 3)
    monkeypatch.setattr(head, "BACKWARD_COLUMNS", 50)
    hidden, weight = torch.randn(11, 8, requires_grad=True), torch.randn(130, 8, requires_grad=True)
    tokens, largest = torch.randint(0, 130, (11,)), 0

    def matmul(rows: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(rows))
        return kernels.linear(rows, weight.detach().T.contiguous(), None)

    y = kernels.head_logprobs(hidden, weight, tokens, matmul, temperature=0.7, softcap=softcap)
    whole = kernels.soft_cap(kernels.linear(hidden, weight.T.contiguous(), None), softcap)
    expected = kernels.token_logprobs(whole, tokens, 0.7)
    assert torch.equal(y, expected)
    assert largest == 4
    scale = torch.linspace(-1.0, 2.0, 11)
    got = torch.autograd.grad((y * scale).sum(), [hidden, weight])
    for a, b in zip(got, torch.autograd.grad((expected * scale).sum(), [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_wrong_inputs(mode: str) -> None:
    logits, tokens = torch.zeros(2, 3), torch.tensor([0, 1])
    with kernels.force(mode):  # type: ignore[arg-type]
        for value, match in ((-torch.inf, "-inf"), (torch.nan, "nan"), (torch.inf, "inf")):
            bad = logits.clone()
            bad[1] = value
            with pytest.raises(InputError, match=rf"logits\[1\] is {match}"):
                kernels.token_logprobs(bad, tokens)
            with pytest.raises(InputError, match=rf"logits\[1\] is {match}"):
                kernels.top_logprobs(bad, 1)
        with pytest.raises(InputError, match=r"tokens\[1\] is 3"):
            kernels.token_logprobs(logits, torch.tensor([0, 3]))
        with pytest.raises(InputError, match="temperature=0"):
            kernels.token_logprobs(logits, tokens, 0.0)
        with pytest.raises(InputError, match="expected"):
            kernels.token_logprobs(logits, torch.tensor([0]))
        with pytest.raises(InputError, match="num=4"):
            kernels.top_logprobs(logits, 4)
        with pytest.raises(InputError, match="the head made"):
            kernels.head_logprobs(torch.zeros(2, 4), torch.zeros(3, 4), tokens, lambda x: x)
        assert float(kernels.token_logprobs(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]))) == -torch.inf
