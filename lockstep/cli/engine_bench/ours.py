"""Our side: `python -m lockstep.cli.engine_bench.ours`. Asks and answers are the peers' (see `llama_cpp.py`, `vllm.py`)."""

from __future__ import annotations

import time
from typing import Any

import torch

from lockstep import kernels
from lockstep.cli.engine_bench.answering import serve_lines
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.engine import Engine
from lockstep.interop.weights import open_weights
from lockstep.models.families import load_model
from lockstep.models.language import LanguageModel

CONTEXT = 1024


class Ours:
    """An engine that is given ids and gives ids; every figure includes all of its step: scheduling, sampling, log-probs."""

    def __init__(self) -> None:
        self._model: LanguageModel
        self._engine: Engine
        self._num_requests = 0

    def load(self, model: str, dtype: str, threads: int, sequences: int, step_tokens: int) -> dict[str, Any]:
        kernels.set_num_threads(threads)
        self._model = load_model(open_weights(model), dtype)
        config = EngineConfig(
            max_sequences=sequences,
            max_step_tokens=step_tokens,
            max_context=CONTEXT,
            num_pages=sequences * CONTEXT // 16 + 64,
            eos_token_ids=(),
        )
        self._engine = Engine(self._model, None, config)
        return {}

    def decode(self, tokens: int) -> dict[str, Any]:
        """Seconds of `tokens` steps of one text from position 0 on."""
        return {"seconds": self._run([[1]], tokens)["seconds"]}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Seconds from the prompt to its first token."""
        return {"seconds": self._run([prompt], 1)["seconds"]}

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """All at once, greedy: seconds, texts, and how many tokens were computed and how many came from the cache."""
        return self._run(prompts, max_tokens)

    def cold(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """The texts of one prompt after the other, each with an empty cache."""
        return {"texts": [self._run([prompt], max_tokens)["texts"][0] for prompt in prompts]}

    def _run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        engine, counters = self._engine, self._engine.counters
        engine.flush_prefixes()
        before = counters.num_computed_tokens, counters.num_cached_tokens
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        start = time.perf_counter()
        samples = []
        for prompt in prompts:
            self._num_requests += 1
            samples += engine.add(Request(id=str(self._num_requests), prompt=tuple(prompt), params=params))
        while engine.has_work:
            engine.step()
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "texts": [list(sample.tokens) for sample in samples],
            "computed": counters.num_computed_tokens - before[0],
            "cached": counters.num_cached_tokens - before[1],
        }


def main() -> None:
    ours = Ours()
    with torch.no_grad():
        serve_lines(
            {
                "load": ours.load,
                "decode": ours.decode,
                "prefill": ours.prefill,
                "generate": ours.generate,
                "cold": ours.cold,
            }
        )


if __name__ == "__main__":
    main()
