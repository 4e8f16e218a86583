"""Penalties, bias and bans against their definitions, and through the engine."""

from __future__ import annotations

import random

import pytest
import torch

from lockstep.core.errors import InputError
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.engine.engine import Engine
from lockstep.engine.shaping import Shaper
from tests.engine.fake import VOCAB, FakeModel, run, tiny


def expected_row(row: torch.Tensor, params: SamplingParams, prompt: list[int], text: list[int]) -> torch.Tensor:
    """The definition, a token at a time."""
    out = row.clone()
    for token in range(len(row)):
        if token in prompt or token in text:
            penalty = params.repetition_penalty
            out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
        count = text.count(token)
        out[token] -= params.frequency_penalty * count + (params.presence_penalty if count else 0.0)
    for token, value in params.logit_bias:
        out[token] += value
    for token in range(len(row)):
        if token in params.bad_token_ids or (params.allowed_token_ids and token not in params.allowed_token_ids):
            out[token] = -torch.inf
    if len(text) < params.min_tokens:
        for token in (0, *params.stop_token_ids):
            out[token] = -torch.inf
    return out


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(presence_penalty=0.7, frequency_penalty=-0.2),
        SamplingParams(repetition_penalty=0.8, frequency_penalty=0.5, logit_bias=((3, 2.0), (4, -1.0))),
        SamplingParams(allowed_token_ids=(1, 2, 3), bad_token_ids=(2,)),
        SamplingParams(min_tokens=6, stop_token_ids=(5,)),
    ],
)
def test_shaping_is_its_definition(params: SamplingParams) -> None:
    rng = random.Random(2)
    prompt = [rng.randrange(VOCAB) for _ in range(9)]
    shaper = Shaper(params, prompt, VOCAB, (0,))
    assert Shaper.is_needed(params)
    text: list[int] = []
    for step in range(20):
        row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(step))
        ahead = [rng.randrange(VOCAB) for _ in range(step % 4)]
        got = row.clone()
        shaper.apply(got, len(text) + len(ahead), ahead)
        torch.testing.assert_close(got, expected_row(row, params, prompt, text + ahead), rtol=1e-6, atol=1e-6)
        text.append(rng.randrange(VOCAB))
        shaper.observe(text[-1])


def test_bad_words_ban_their_last_token_after_the_others() -> None:
    params, sequences = SamplingParams(bad_words=("x",)), [(7,), (1, 2), (3, 1, 2, 4)]
    assert Shaper.is_needed(params)
    shaper = Shaper(params, [1, 3, 1], VOCAB, (0,), None, sequences)  # what the prompt ends in does not count
    text: list[int] = []
    for token, ahead in ((1, []), (3, []), (1, [2]), (2, []), (5, [3, 1, 2]), (3, [1])):
        got = torch.zeros(VOCAB)
        shaper.copy().apply(got, len(text) + len(ahead), ahead)
        written = [*text, *ahead]
        banned = {ids[-1] for ids in sequences if tuple(written[len(written) - len(ids) + 1 :]) == ids[:-1]}
        assert {i for i in range(VOCAB) if got[i] < 0} == banned
        text.append(token)
        shaper.observe(token)


def test_bad_words_refusals() -> None:
    with pytest.raises(InputError, match="blanks only"):
        SamplingParams(bad_words=("a", " "))
    with pytest.raises(InputError, match="use bad_token_ids"):
        Engine(FakeModel(), None, tiny()).add(Request(id="a", prompt=(1,), params=SamplingParams(bad_words=("a",))))


def test_more_tokens_than_the_first_buffer() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    shaper = Shaper(params, list(range(700)), 1000, ())
    row = torch.ones(1000)
    shaper.apply(row, 0, [])
    assert row.tolist() == [0.5] * 700 + [1.0] * 300


def test_plain_parameters_need_no_shaping() -> None:
    assert not Shaper.is_needed(SamplingParams(temperature=0.3, top_k=5, n=2, stop=("x",), seed=3, max_tokens=4))


@pytest.mark.parametrize(
    "wish",
    [
        {"repetition_penalty": 1.5, "frequency_penalty": 0.4},
        {"allowed_token_ids": (3, 4, 5, 6)},
        {"min_tokens": 30, "presence_penalty": 1.0},
    ],
)
def test_shaped_texts_survive_guesses_and_a_small_pool(wish: dict) -> None:
    texts = []
    for changes in ({}, {"max_draft_tokens": 5}, {"num_pages": 10, "max_draft_tokens": 3}):
        engine = Engine(FakeModel(), None, tiny(**changes))
        samples = []
        for i in range(6):
            params = SamplingParams(max_tokens=50, seed=i, temperature=0.4 * (i % 2), **wish)
            samples += engine.add(Request(id=f"{i}", prompt=tuple(range(i, i + 15)), params=params))
        run(engine)
        texts.append([sample.tokens for sample in samples])
    assert texts[0] == texts[1] == texts[2]
    if "allowed_token_ids" in wish:
        assert {token for text in texts[0] for token in text} <= {3, 4, 5, 6}
