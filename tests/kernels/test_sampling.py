"""Sampling: the tokens of the twin on every level, what the filters keep, the distribution, independence of the batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import InputError

NUM_CASES = 50
"""Batches per level, of eight rows each."""


def draw(logits: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
    """One wish for all rows where a single value is given."""
    num = len(logits)
    defaults = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "seeds": 0,
        "positions": 0,
    }
    integers = ("top_k", "seeds", "positions")
    columns = []
    for name, default in defaults.items():
        dtype = torch.int64 if name in integers else torch.float32
        columns.append(torch.as_tensor(wishes.get(name, default), dtype=dtype).expand(num).contiguous())
    return kernels.sample_tokens(logits, *columns)


def random_wishes(rng: random.Random, num: int) -> dict[str, list[float]]:
    def column(usual: float, *others: float) -> list[float]:
        return [rng.choice((usual, *others)) for _ in range(num)]

    return {
        "temperature": column(1.0, 0.0, 0.7, 1.7),
        "top_k": column(0, 1, 5, 50, 1500, 10**6),
        "top_p": column(1.0, 0.1, 0.5, 0.9, 0.999),
        "min_p": column(0.0, 0.05, 0.5),
        "typical_p": column(1.0, 1.0, 0.3, 0.9),
        "seeds": [rng.randrange(-(2**63), 2**63) for _ in range(num)],
        "positions": [rng.randrange(2**20) for _ in range(num)],
    }


def test_every_level_draws_the_tokens_of_the_twin(level: int) -> None:
    rng = random.Random(3)
    for index in range(NUM_CASES):
        torch.manual_seed(index)
        vocab = rng.choice([1, 2, 17, 100, 1025, 5001])
        logits = torch.randn(8, vocab) * rng.choice([0.0, 0.5, 3.0, 12.0])
        if rng.random() < 0.3:
            logits = logits.round()  # ties
        if vocab > 2:
            logits[torch.rand(8, vocab) < 0.2] = -torch.inf
            logits[:, vocab // 2] = 0.5
        wishes = random_wishes(rng, 8)
        tokens, logprobs = draw(logits, **wishes)
        with kernels.force("naive"):
            naive_tokens, naive_logprobs = draw(logits, **wishes)
        assert torch.equal(tokens, naive_tokens), (index, wishes)
        torch.testing.assert_close(logprobs, naive_logprobs, rtol=1e-5, atol=2e-6)


def test_a_row_depends_on_itself_alone(level: int) -> None:
    rng = random.Random(5)
    logits, wishes = torch.randn(30, 4000) * 3, random_wishes(rng, 30)
    whole = draw(logits, **wishes)
    before = kernels.num_threads()
    try:
        kernels.set_num_threads(2)
        order = list(range(30))
        rng.shuffle(order)
        for rows in (order[:1], order[1:12], order[12:]):
            part = draw(logits[rows], **{name: [column[r] for r in rows] for name, column in wishes.items()})
            assert torch.equal(part[0], whole[0][rows])
            assert torch.equal(part[1], whole[1][rows])
    finally:
        kernels.set_num_threads(before)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_without_filters_the_logprob_has_the_trainers_bits(mode: str) -> None:
    logits = torch.randn(20, 3333) * 3
    with kernels.force(mode):  # type: ignore[arg-type]
        for temperature in (1.0, 0.6):
            tokens, logprobs = draw(logits, temperature=temperature, seeds=list(range(20)))
            assert torch.equal(logprobs, kernels.token_logprobs(logits, tokens, temperature))


def support(logits: Tensor, num: int = 4000, **wishes: object) -> list[int]:
    """Tokens that appear among many draws of one row."""
    tokens, _ = draw(logits.expand(num, -1), positions=list(range(num)), **wishes)
    return sorted(set(tokens.tolist()))


def test_what_each_filter_keeps() -> None:
    logits = torch.tensor([0.1, 0.4, 0.1, 0.2, 0.2]).log()
    assert support(logits) == [0, 1, 2, 3, 4]
    assert support(logits, top_k=2) == [1, 3]  # of the two equals, the lower id
    assert support(logits, top_k=4) == [0, 1, 3, 4]
    assert support(logits, top_p=0.41) == [1, 3]
    assert support(logits, top_p=0.7) == [1, 3, 4]
    assert support(logits, min_p=0.4) == [1, 3, 4]
    assert support(logits, top_k=3, top_p=0.6) == [1, 3]  # 0.4 and 0.2 of the 0.8 that top_k left are enough
    # Entropy 1.47: the tokens of 0.2 (1.61) are the most typical, then 0.4 (0.92), then 0.1 (2.30).
    assert support(logits, typical_p=0.35) == [3, 4]
    assert support(logits, typical_p=0.7) == [1, 3, 4]
    assert support(torch.zeros(8), top_p=0.5) == [0, 1, 2, 3]
    assert support(torch.tensor([1.0, -torch.inf, 1.0]), top_k=3) == [0, 2]


def test_noise_of_a_token_does_not_depend_on_the_filters() -> None:
    logits = torch.randn(200, 50)
    seeds = list(range(200))
    free, _ = draw(logits, seeds=seeds)
    kept, _ = draw(logits, seeds=seeds, top_k=25)
    strong = logits.argsort(1, descending=True).argsort(1).gather(1, free.unsqueeze(1)).squeeze(1) < 25
    assert int(strong.sum()) > 100
    assert torch.equal(free[strong], kept[strong])


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [7, 4000]] = 1.0
    logits[1, 4999] = 2.0
    tokens, logprobs = draw(logits, temperature=0.0)
    assert tokens.tolist() == [7, 4999, 0]
    assert logprobs.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("wishes", "kept"), [({}, range(6)), ({"top_k": 3}, (0, 1, 2)), ({"temperature": 2.0, "top_p": 0.8}, (0, 1, 2, 3))]
)
def test_draws_follow_the_distribution(wishes: dict[str, float], kept: range | tuple[int, ...]) -> None:
    logits, num = torch.tensor([1.5, 1.0, 0.5, 0.0, -0.5, -1.0]), 20_000
    for seeds, positions in (([1] * num, range(num)), (range(num), [9] * num)):
        tokens, logprobs = draw(logits.expand(num, -1), seeds=list(seeds), positions=list(positions), **wishes)
        expected = (logits[list(kept)] / wishes.get("temperature", 1.0)).softmax(0) * num
        counts = torch.bincount(tokens, minlength=6)[list(kept)]
        assert int(counts.sum()) == num
        # Chi-square with at most 5 degrees of freedom: above 20.5 once in a thousand; the seeds are fixed.
        assert float(((counts - expected) ** 2 / expected).sum()) < 20.5
        rows = torch.stack([(tokens == token).to(torch.int64).argmax() for token in kept])
        torch.testing.assert_close(logprobs[rows], (expected / num).log(), rtol=1e-5, atol=1e-5)


def test_a_large_flat_vocabulary_is_the_twins(level: int) -> None:
    """Nothing can be left out here, and a cut by mass falls among tens of thousands of tokens."""
    logits = torch.randn(2, 40_000)
    for wishes in (
        {},
        {"top_p": 0.9},
        {"top_p": 0.5, "min_p": 0.01},
        {"top_k": 20_000},
        {"top_p": 0.9, "typical_p": 0.5},
    ):
        tokens, logprobs = draw(logits, seeds=[4, 5], **wishes)
        with kernels.force("naive"):
            naive_tokens, naive_logprobs = draw(logits, seeds=[4, 5], **wishes)
        assert torch.equal(tokens, naive_tokens)
        torch.testing.assert_close(logprobs, naive_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_wrong_inputs(mode: str) -> None:
    logits = torch.zeros(3, 4)
    with kernels.force(mode):  # type: ignore[arg-type]
        for value in (-torch.inf, torch.nan, torch.inf):
            bad = logits.clone()
            bad[2] = value
            for temperature in (0.0, 1.0):
                with pytest.raises(InputError, match=r"logits\[2\] is"):
                    draw(bad, temperature=temperature)
        for temperature in (-1.0, torch.nan, torch.inf):
            with pytest.raises(InputError, match=r"temperature\[1\]"):
                draw(logits, temperature=[1.0, temperature, 1.0])
        with pytest.raises(InputError, match="top_k is"):
            kernels.sample_tokens(logits, *(torch.zeros(3) for _ in range(7)))
        with pytest.raises(InputError, match=r"expected float32 \[R, V\]"):
            draw(logits.double())


def score(logits: Tensor, tokens: Tensor, wishes: dict[str, list[float]]) -> tuple[Tensor, Tensor]:
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.float32)
    columns = (torch.tensor(wishes[name], dtype=dtype) for name, dtype in zip(names, dtypes, strict=True))
    return kernels.score_tokens(logits, tokens, *columns)


def test_scores_are_what_was_reported_at_the_draw(level: int) -> None:
    rng = random.Random(11)
    for index in range(NUM_CASES // 2):
        torch.manual_seed(index)
        vocab = rng.choice([2, 17, 100, 1025, 5001])
        logits = torch.randn(8, vocab) * rng.choice([0.0, 0.5, 3.0, 12.0])
        logits[torch.rand(8, vocab) < 0.1] = -torch.inf
        logits[:, vocab // 2] = 0.5
        wishes = random_wishes(rng, 8)
        wishes["temperature"] = [value or 1.0 for value in wishes["temperature"]]
        tokens, logprobs = draw(logits, **wishes)
        scored, kept = score(logits, tokens, wishes)
        assert torch.equal(scored, logprobs), wishes
        scaled = logits / torch.tensor(wishes["temperature"])[:, None]
        again = scaled.masked_fill(~kept, -torch.inf).log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
        torch.testing.assert_close(scored, again, rtol=1e-5, atol=3e-6)
        with kernels.force("naive"):
            naive, naive_kept = score(logits, tokens, wishes)
        assert torch.equal(kept, naive_kept)
        torch.testing.assert_close(scored, naive, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_a_token_that_would_not_be_kept_is_counted_in(mode: str) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    wishes = {"temperature": [1.0], "top_k": [2], "top_p": [1.0], "min_p": [0.0], "typical_p": [1.0]}
    with kernels.force(mode):  # type: ignore[arg-type]
        scored, kept = score(logits, torch.tensor([3]), wishes)
        assert kept.tolist() == [[True, True, False, True]]
        torch.testing.assert_close(scored[0], logits[0, [0, 1, 3]].log_softmax(0)[2])
        with pytest.raises(InputError, match=r"tokens\[0\] is 4"):
            score(logits, torch.tensor([4]), wishes)
        with pytest.raises(InputError, match="temperature"):
            score(logits, torch.tensor([0]), {**wishes, "temperature": [0.0]})
