"""Beam search against Transformers on a random model: the same texts, and the same scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lockstep.core.request import Request, Sample
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.engine import Engine
from lockstep.models.language import LanguageModel
from tests.parity.test_transformers import tokens

pytestmark = pytest.mark.slow


def search(model: LanguageModel, prompt: tuple[int, ...], params: SamplingParams, *eos: int) -> list[Sample]:
    engine = Engine(model, None, EngineConfig(num_pages=60, eos_token_ids=eos))
    samples = engine.add(Request(id="a", prompt=prompt, params=params))
    while engine.has_work:
        engine.step()
    return samples


CASES = [(2, 1.0, False, 24), (4, 1.0, True, 24), (4, 0.3, False, 24), (5, -0.5, True, 16), (3, 2.0, False, 30)]


@pytest.mark.slow
def test_beams_are_those_of_transformers(pair_of: Callable[..., Any]) -> None:
    pair = pair_of("Llama")
    model, num_ended, num_full = pair.ours(), 0, 0
    for number, (width, penalty, early, length) in enumerate(CASES * 3):
        prompt = tokens(number, 7)
        ids = tuple(prompt.tolist())
        params = SamplingParams(
            beam_width=width, n=width, length_penalty=penalty, early_stopping=early, max_tokens=length
        )
        # A token that comes up on the way shall be the end.
        eos = search(model, ids, params)[0].tokens[number % 4 + 1]
        samples = search(model, ids, params, eos)
        with torch.no_grad():
            expected = pair.reference.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                num_beams=width,
                num_return_sequences=width,
                length_penalty=penalty,
                early_stopping=early,
                max_new_tokens=length,
                eos_token_id=eos,
                pad_token_id=eos,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
        for sample, row, score in zip(samples, expected.sequences, expected.sequences_scores, strict=True):
            written = row[len(prompt) :].tolist()
            ends = written.index(eos) + 1 if eos in written else len(written)
            assert sample.tokens == written[:ends]
            num_ended += sample.tokens[-1] == eos
            num_full += sample.tokens[-1] != eos
            got = sum(sample.logprobs) / len(sample.tokens) ** penalty
            assert got == pytest.approx(float(score), rel=1e-4)
    assert num_ended > 5
    assert num_full > 5
