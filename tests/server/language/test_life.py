"""Loading, health, keys, overload, clients that leave, draining, many at once."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.llm import LLM
from lockstep.server.language import build_language_app
from lockstep.server.language_config import LanguageConfig
from lockstep.server.service import LanguageService, State
from tests.server.language.tiny import LiveServer, live

LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 900, "ignore_eos": True}


def test_health_and_metrics(server: LiveServer, http: httpx.Client) -> None:
    for path in ("/health", "/healthz", "/ready", "/v2/health/live", "/v2/health/ready"):
        assert http.get(path).status_code == 200
    http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 5, "ignore_eos": True})
    page = http.get("/metrics").text
    assert "lockstep_ready 1" in page
    assert 'lockstep_requests_total{route="/v1/completions",status="200"} 1' in page
    for name in ("time_to_first_token_seconds_count", "engine_generated_tokens_total", "kv_pages_free"):
        assert server.metric(f"lockstep_{name}") > 0
    assert http.get("/version").json()["version"]
    assert "no route GET /nothing" in http.get("/nothing").json()["error"]["message"]


def test_tokenize(http: httpx.Client) -> None:
    text = "hello the \U0001fae0"
    reply = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert http.post("/detokenize", json={"tokens": reply["tokens"]}).json()["prompt"] == text
    assert http.post("/tokenize", json={"content": text}).json() == {"tokens": reply["tokens"]}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()
    assert chat["count"] > 8
    assert http.post("/tokenize", json={}).status_code == 400
    refused = http.post("/detokenize", json={"tokens": [5, 272]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages(server: LiveServer, http: httpx.Client, stream: bool) -> None:
    before = server.metric("lockstep_disconnects_total")
    aborted = server.service.metrics.num_disconnected

    async def leave() -> None:
        body = LONG | {"stream": stream, "n": 8}
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=30) as client,
            client.stream("POST", "/v1/completions", json=body) as reply,
        ):
            async for _ in reply.aiter_raw():
                break

    async def scenario() -> float:
        task = asyncio.create_task(leave())
        deadline = time.monotonic() + 10
        while server.service.metrics.num_active == 0:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)
        if stream:
            await task
        else:
            await asyncio.sleep(0.05)
            task.cancel()
        left = time.monotonic()
        await asyncio.gather(task, return_exceptions=True)
        while server.service.metrics.num_active:
            assert time.monotonic() < left + 1
            await asyncio.sleep(0.005)
        return time.monotonic() - left

    assert asyncio.run(scenario()) < 1
    assert server.metric("lockstep_disconnects_total") == before + 1 == aborted + 1
    assert server.metric("lockstep_sequences_running") == 0
    assert server.metric("lockstep_kv_pages_free") + server.metric("lockstep_kv_pages_cached") == 600


def test_many_streams_say_what_each_says_alone(server: LiveServer) -> None:
    llm = LLM(
        server.folder, config=EngineConfig(prefix_cache=False, max_sequences=1), memory_bytes=1 << 24, num_threads=1
    )
    prompts = [f"hello {'the world ' * (number % 5)}{number}" for number in range(32)]
    expected = [
        llm.generate(prompt, SamplingParams(max_tokens=12, seed=number))[0][0].text
        for number, prompt in enumerate(prompts)
    ]

    async def one(client: httpx.AsyncClient, number: int) -> str:
        body = {"prompt": prompts[number], "max_tokens": 12, "seed": number, "stream": True}
        text = ""
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

    async def all_at_once() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            return list(await asyncio.gather(*(one(client, number) for number in range(32))))

    assert asyncio.run(all_at_once()) == expected


def test_key_cors_and_bodies(folder: Path) -> None:
    limits = {"cors_origins": ("http://a.test",), "max_body_bytes": 2000}
    with live(folder, key="secret", **limits) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        refused = client.get("/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.post("/v1/messages", json={}).json()["error"]["type"] == "authentication_error"
        for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert client.get("/v1/models", headers=headers).status_code == 200
        asked = {"origin": "http://a.test", "access-control-request-method": "POST"}
        preflight = client.options("/v1/chat/completions", headers=asked)
        assert preflight.headers["access-control-allow-origin"] == "http://a.test"
        # A page is told why it was refused, and by which request.
        told = client.get("/v1/models", headers={"origin": "http://a.test", "x-request-id": "mine 1"}).headers
        assert told["access-control-allow-origin"] == "http://a.test"
        assert "x-request-id" in told["access-control-expose-headers"]
        assert re.fullmatch("[0-9a-f]{32}", told["x-request-id"])  # the client's own has a blank
        key = {"x-api-key": "secret", "x-request-id": "mine-1"}
        assert client.get("/v1/models", headers=key).headers["x-request-id"] == "mine-1"
        assert client.post("/v1/completions", json={"prompt": "a" * 3000}, headers=key).status_code == 413


def test_overload_is_429_with_retry_after(folder: Path) -> None:
    config = EngineConfig(num_pages=200, max_sequences=1, max_queue=2, max_step_tokens=64)
    with live(folder, engine=config) as server:

        async def scenario() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                body = LONG | {"max_tokens": 60}
                asked = [client.post("/v1/completions", json=body | {"stream": i % 2 == 0}) for i in range(12)]
                return list(await asyncio.gather(*asked))

        replies = asyncio.run(scenario())
        assert {reply.status_code for reply in replies} == {200, 429}
        for reply in replies:
            if reply.status_code == 429:
                assert reply.headers["retry-after"] == "1"
                assert reply.json()["error"]["type"] == "rate_limit_error"


def test_loading_is_told_and_a_failure_too(folder: Path, tmp_path: Path) -> None:
    config = LanguageConfig(num_threads=1)

    async def scenario() -> None:
        service = LanguageService(folder, config)
        transport = httpx.ASGITransport(app=build_language_app(service, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for path in ("/health", "/ready", "/v1/models"):
                reply = await client.get(path)
                assert reply.status_code == 503
                assert "loading" in reply.json()["error"]["message"]
            assert (await client.get("/healthz")).status_code == 200
            assert "lockstep_ready 0" in (await client.get("/metrics")).text
            assert (await client.post("/v1/completions", json={"prompt": "a"})).headers["retry-after"] == "1"
            await service.start()
            assert (await client.get("/health")).status_code == 200
            await service.drain()
            assert (await client.get("/health")).status_code == 503
        (tmp_path / "config.json").write_text("{}")
        broken = LanguageService(tmp_path, config)
        await broken.start()
        assert broken.state is State.FAILED
        assert "model_type" in str(broken.error)

    asyncio.run(scenario())


def test_drain_ends_what_runs_and_refuses_what_comes(folder: Path) -> None:
    with live(folder, drain_s=20.0) as server:
        found: list[httpx.Response] = []
        body = LONG | {"max_tokens": 300}
        running = threading.Thread(
            target=lambda: found.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=30))
        )
        running.start()
        while server.service.metrics.num_active == 0:
            time.sleep(0.002)
        drained = asyncio.run_coroutine_threadsafe(server.service.drain(), server.loop)
        while server.service.state is State.READY:
            time.sleep(0.002)
        late = httpx.post(f"{server.url}/v1/completions", json=body)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        drained.result(20)
        running.join(20)
        assert found[0].json()["usage"]["completion_tokens"] == 300


def test_drain_has_a_deadline(folder: Path) -> None:
    with live(folder, drain_s=0.0) as server:
        found: dict[bool, httpx.Response] = {}

        def ask(stream: bool) -> None:
            found[stream] = httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": stream}, timeout=30)

        running = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in running:
            thread.start()
        while server.service.metrics.num_active < 2 or sum(server.service.metrics.first_token.counts) < 2:
            time.sleep(0.002)
        asyncio.run_coroutine_threadsafe(server.service.drain(), server.loop).result(20)
        for thread in running:
            thread.join(20)
        assert found[False].status_code == 503
        # A stream's status is out already: its last event tells.
        *_, last, done = [line for line in found[True].text.splitlines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "overloaded_error"
        assert done == "data: [DONE]"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "input",
        "system",
        "tools",
        "tool_choice",
        "stream",
        "n",
        "stop",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "logprobs",
        "echo",
        "top_logprobs",
        "logit_bias",
        "seed",
        "response_format",
        "stream_options",
        "text",
        "metadata",
        "reasoning",
        "stop_sequences",
        "guided_json",
        "structured_outputs",
        "chat_template_kwargs",
        "min_tokens",
        "allowed_token_ids",
        "stop_token_ids",
        "tokens",
        "content",
        "encoding_format",
    ]
)
ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
GOOD = {
    "prompt": "hello",
    "messages": [{"role": "user", "content": "hello"}],
    "input": "hello",
    "max_tokens": 2,
    "max_output_tokens": 2,
}


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(NAMES, JSON, max_size=3))
def test_no_body_makes_a_server_error(http: httpx.Client, route: str, changes: dict[str, Any]) -> None:
    content = json.dumps(GOOD | changes)
    reply = http.post(route, content=content)
    assert reply.status_code in (200, 400, 404), (content, reply.text)
    if reply.status_code == 400:
        assert reply.json()["error"]["message"]


FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CHAT_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RICH: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "b"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "text"},
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": True},
        "logit_bias": {"5": 1.0},
        "max_tokens": 2,
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "b"},
        ],
        "tools": [{"type": "function", **FUNCTION}],
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "integer"}}},
        "reasoning": {"effort": "low"},
        "max_output_tokens": 2,
    },
    "/v1/messages": {
        "system": [{"type": "text", "text": "a"}],
        "messages": [
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "b"}]}],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "max_tokens": 2,
    },
}


def _changed(data: st.DataObject, value: Any) -> Any:
    """A copy with one part, at any depth, replaced or taken away."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 3)) == 0:
        return data.draw(JSON)
    if isinstance(value, list):
        place = data.draw(st.integers(0, len(value) - 1))
        return [_changed(data, item) if index == place else item for index, item in enumerate(value)]
    name = data.draw(st.sampled_from(sorted(value)))
    if data.draw(st.integers(0, 5)) == 0:
        return {key: item for key, item in value.items() if key != name}
    return value | {name: _changed(data, value[name])}


@pytest.mark.parametrize("route", sorted(RICH))
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), stream=st.booleans())
def test_no_change_of_a_rich_body_makes_a_server_error(http: httpx.Client, route: str, data: Any, stream: bool) -> None:
    body = _changed(data, RICH[route])
    content = json.dumps(body | {"stream": stream} if isinstance(body, dict) else body)
    reply = http.post(route, content=content)
    assert reply.status_code in (200, 400, 404), (content, reply.text)
    assert "server_error" not in reply.text, (content, reply.text)
    assert "api_error" not in reply.text, (content, reply.text)
