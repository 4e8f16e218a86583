"""llama.cpp's side, run by the Python that has `llama-cpp-python`: what its own `llama-bench` does, through the C API.

load     one context of 1024 tokens, a batch as long as the longest prompt
decode   so many `llama_decode` of one token from an empty cache; nothing is sampled
prefill  one `llama_decode` of the prompt from an empty cache, logits of its last token
"""

from __future__ import annotations

import importlib
import time
from typing import Any

from answering import serve_lines  # the script's own folder; nothing of Lockstep is installed where this runs

CONTEXT = 1024


class LlamaCpp:
    def __init__(self) -> None:
        self._api: Any = importlib.import_module("llama_cpp")
        self._context: Any = None

    def load(self, model: str, threads: int) -> dict[str, Any]:
        api = self._api
        api.llama_backend_init()
        self._loaded = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
        if not self._loaded:
            raise SystemExit(f"llama.cpp cannot load {model}")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._loaded, params)
        if not self._context:
            raise SystemExit("llama.cpp cannot make a context")
        return {"version": api.__version__, "system": api.llama_print_system_info().decode()}

    def decode(self, tokens: int) -> dict[str, Any]:
        self._clear()
        start = time.perf_counter()
        for _ in range(tokens):
            self._eval([1])
        return {"seconds": time.perf_counter() - start}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        self._clear()
        start = time.perf_counter()
        self._eval(prompt)
        return {"seconds": time.perf_counter() - start}

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _eval(self, tokens: list[int]) -> None:
        array = (self._api.llama_token * len(tokens))(*tokens)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")
        self._api.llama_synchronize(self._context)


if __name__ == "__main__":
    peer = LlamaCpp()
    serve_lines({"load": peer.load, "decode": peer.decode, "prefill": peer.prefill})
