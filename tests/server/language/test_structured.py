"""Structured output on a live server: a grammar that takes for ever is the client's error, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from lockstep.engine.config import EngineConfig
from tests.server.language.tiny import live

pytest.importorskip("llguidance")
HOSTILE = "a?" * 60000
"""Compiling it takes minutes and gigabytes."""


def test_a_slow_grammar_is_refused_abandoned_and_drained(folder: Path) -> None:
    with (
        live(folder, drain_s=0.1, engine=EngineConfig(grammar_timeout_s=0.3, num_pages=200)) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        body: dict[str, Any] = {"prompt": "hello", "max_tokens": 8}
        assert http.post("/v1/completions", json=body | {"guided_regex": "(yes|no)"}).status_code == 200
        hostile = body | {"guided_regex": HOSTILE}
        found: list[httpx.Response] = []

        def ask() -> None:
            found.append(httpx.post(f"{server.url}/v1/completions", json=hostile, timeout=30))

        refused = threading.Thread(target=ask)
        refused.start()
        num_others = 0
        while refused.is_alive():
            num_others += http.post("/v1/completions", json=body | {"ignore_eos": True}).status_code == 200
        error = found.pop().json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", "guided_regex")
        assert "the regex cannot be used: compiling it took" in error["message"]
        assert num_others >= 5

        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=hostile | {"stream": True}, timeout=0.1)
        left = time.monotonic()
        while server.service.metrics.num_active or server.metric("lockstep_sequences_waiting"):
            assert time.monotonic() < left + 1
            time.sleep(0.01)

        drained = threading.Thread(target=ask)
        drained.start()
        while server.service.metrics.num_active == 0:
            time.sleep(0.002)
        asyncio.run_coroutine_threadsafe(server.service.drain(), server.loop).result(20)
        drained.join(20)
        assert found[0].status_code == 503
