"""A tiny random model in a Hugging Face folder, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import save_file

from lockstep.models.families import build_model, hf_tensors
from lockstep.server.language import build_language_app
from lockstep.server.language_config import LanguageConfig
from lockstep.server.language_run import language_server, serve_until_told
from lockstep.server.service import LanguageService
from lockstep.tokenize.vocabulary import CHARACTER_OF_BYTE

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t.function.name }} {% endfor %}<tool_call><|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "t h", "th e", "Ġ the"]
VOCAB = 272
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


def write_model(folder: Path, **changes: Any) -> Path:
    """The folder, filled."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    save_file(hf_tensors(build_model(config, 3), config), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokens = [CHARACTER_OF_BYTE[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in MERGES]
    added = [
        {"id": len(tokens) + number, "content": text, "special": text in SPECIAL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, text in enumerate([*SPECIAL, "<tool_call>", "</tool_call>", "<think>", "</think>"])
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": MERGES}
    document = {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    return folder


@contextmanager
def live(folder: Path, *, key: str = "", **config: Any) -> Iterator[LiveServer]:
    """A server on a loopback port, in a thread of this process."""
    server = LiveServer(folder, LanguageConfig(**{"port": 0, "served_name": "tiny", "num_threads": 1, **config}), key)
    server.thread.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join(30)
        assert not server.thread.is_alive()


class LiveServer:
    """The server and what a test needs of it."""

    def __init__(self, folder: Path, config: LanguageConfig, key: str) -> None:
        self.folder = folder
        self.service = LanguageService(folder, config)
        self.server = language_server(build_language_app(self.service, config, key=key), config)
        self.loop: asyncio.AbstractEventLoop
        self.thread = threading.Thread(target=self._run, name="server")

    def _run(self) -> None:
        async def whole() -> None:
            self.loop = asyncio.get_running_loop()
            await serve_until_told(self.server, self.service)

        asyncio.run(whole())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while not self.server.started or httpx.get(f"{self.url}/health", timeout=30).status_code != 200:
            assert time.monotonic() < deadline, self.service.error
            assert self.service.error is None, self.service.error
            time.sleep(0.02)

    def metric(self, name: str) -> float:
        """A number of the Prometheus page."""
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if line.startswith(name + " "):
                return float(line.split(" ")[1])
        raise AssertionError(f"{name} is not among the metrics")
