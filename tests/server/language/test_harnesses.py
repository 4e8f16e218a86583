"""Programs of others that talk to such servers: litellm, and lm-eval's local-completions. They bring many packages of their
own, so they run where somebody installed them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lockstep.core.sampling import SamplingParams
from lockstep.engine.llm import LLM
from tests.server.language.tiny import LiveServer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_litellm(server: LiveServer, provider: str) -> None:
    litellm = pytest.importorskip("litellm")
    wishes: dict[str, Any] = {
        "model": f"{provider}/tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 12,
        "temperature": 0,
        "api_key": "none",
        "api_base": server.url + ("/v1" if provider == "openai" else ""),
    }
    whole = litellm.completion(**wishes).choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**wishes, stream=True))
    assert whole == streamed != ""


def test_lm_eval_scores_as_the_engine_does(server: LiveServer) -> None:
    models = pytest.importorskip("lm_eval.models.openai_completions")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    model = models.LocalCompletionsAPI(
        model="tiny",
        base_url=f"{server.url}/v1/completions",
        tokenizer=str(server.folder),
        num_concurrent=1,
        batch_size=2,
    )
    llm = LLM(server.folder, memory_bytes=1 << 24, num_threads=1)
    pairs = [("hello the", " world"), ("hello", " the end"), ("a b", "c")]
    asked = [instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    for (context, more), (total, is_greedy) in zip(pairs, model.loglikelihood(asked), strict=True):
        ids, num = llm.encode(context + more), len(llm.encode(context))
        sample = llm.generate(ids, SamplingParams(max_tokens=1, prompt_logprobs=1))[0][0]
        own = sample.prompt_logprobs[num:]
        assert math.isclose(total, sum(value for value in own if value is not None), rel_tol=1e-9)
        assert is_greedy == all(
            value == alternatives[0].logprob
            for value, alternatives in zip(own, sample.prompt_alternatives[num:], strict=True)
        )
