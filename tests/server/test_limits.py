"""Size, key, media type, overload, deadline: refused in the envelope, and the server goes on."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.core.errors import ConfigError, InputError
from lockstep.server.config import ServeConfig
from lockstep.server.runner import Ask, Decision, Runner

from .conftest import Server

GOOD = {"observation": [0.0, 0.1, 0.2, 0.3]}
ACT = "/v1/policies/cart/act"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", JSON, 400),
        (b"{", JSON, 400),
        (b"null", JSON, 400),
        (b"[]", JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b'{"observation":' + b"[" * 500 + b"]" * 500 + b"}", JSON, 400),
        (b'{"observation": 1e999}', JSON, 400),
        (b'{"observation": ' + b"9" * 5000 + b"}", JSON, 400),
        (b"\xff\xfe{}", JSON, 400),
        (b'{"observation": "\\ud800"}', JSON, 400),
        (b"observation=1", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (json.dumps(GOOD).encode(), {**JSON, "content-encoding": "br"}, 415),
        (b"not gzip", {**JSON, "content-encoding": "gzip"}, 400),
        (gzip.compress(json.dumps(GOOD).encode(), mtime=0)[:-4], {**JSON, "content-encoding": "gzip"}, 400),
        (gzip.compress(b" " * 10_000_000, mtime=0), {**JSON, "content-encoding": "gzip"}, 413),
        (b" " * 100_001, JSON, 413),
        (json.dumps(GOOD).encode(), {**JSON, "content-length": "x"}, 400),
        (json.dumps(GOOD).encode(), {"content-type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_raw_bodies(folders: dict[str, Path], content: bytes, headers: dict[str, str], status: int) -> None:
    server = Server({"cart": folders["cart"]}, max_body_bytes=100_000)
    reply = server.call("POST", ACT, content=content, headers=headers)
    assert reply.status_code == status, reply.text
    assert status == 200 or reply.json()["field"]


def test_a_body_in_parts_is_limited_too(folders: dict[str, Path]) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 1000

    server = Server({"cart": folders["cart"]}, max_body_bytes=5000)
    assert server.call("POST", ACT, content=parts(), headers=JSON).status_code == 413


def test_a_slow_body_meets_its_deadline(folders: dict[str, Path]) -> None:
    server = Server({"cart": folders["cart"]}, request_timeout_s=0.1)
    sent: list[dict[str, Any]] = []

    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-length", b"10"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": ACT, "headers": headers}
    asyncio.run(server.gate(scope, never, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}, {"authorization": "Basic secret"}])
def test_a_key_is_asked_for(folders: dict[str, Path], headers: dict[str, str]) -> None:
    server = Server({"cart": folders["cart"]}, key="secret")
    refused = server.act("cart", GOOD, headers=headers)
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert server.call("GET", "/metrics", headers=headers).status_code == 401
    for path in ("/health", "/healthz", "/ready", "/v2/health/live", "/v2/health/ready"):
        assert server.call("GET", path, headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{"x-api-key": "secret"}, {"authorization": "Bearer secret"}])
def test_the_key_opens(folders: dict[str, Path], headers: dict[str, str]) -> None:
    server = Server({"cart": folders["cart"]}, key="secret")
    assert server.act("cart", GOOD, headers=headers).status_code == 200


def gated_run(gate: threading.Event) -> Any:
    """`Runner.run` that begins once the gate is open: a policy slower than whatever is waited for meanwhile."""
    run = Runner.run

    def gated(self: Runner, asks: Sequence[Ask]) -> list[Decision | InputError]:
        assert gate.wait(60)
        return run(self, asks)

    return gated


def replies_of(server: Server, num: int, gate: threading.Event, opens: str) -> list[httpx.Response]:
    """Replies to `num` requests at once; the gate opens after the first reply, or after all of them."""

    async def together(client: httpx.AsyncClient) -> list[httpx.Response]:
        asks = [asyncio.create_task(client.post(ACT, json=GOOD)) for _ in range(num)]
        try:
            await asyncio.wait(asks, return_when=opens)
        finally:
            gate.set()
        return list(await asyncio.gather(*asks))

    replies = server.run(together)
    server.repository.close()
    return replies


def threaded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, **config: Any) -> Server:
    monkeypatch.setattr("lockstep.server.repository.INLINE_BELOW_S", 0.0)
    return Server({"cart": folders["cart"]}, **config)


def test_a_full_queue_is_told_to_come_back(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, gate = threaded(folders, monkeypatch, max_queue=4, max_batch=1), threading.Event()
    monkeypatch.setattr(Runner, "run", gated_run(gate))
    replies = replies_of(server, 20, gate, asyncio.FIRST_COMPLETED)
    refused = [reply for reply in replies if reply.status_code == 429]
    assert refused
    assert all(reply.headers["retry-after"] == "1" for reply in refused)
    assert {reply.status_code for reply in replies} == {200, 429}


def test_a_deadline_ends_the_wait(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """All replies come while the policy still runs."""
    server, gate = threaded(folders, monkeypatch, request_timeout_s=0.3, max_batch=1), threading.Event()
    monkeypatch.setattr(Runner, "run", gated_run(gate))
    replies = replies_of(server, 3, gate, asyncio.ALL_COMPLETED)
    assert {reply.status_code for reply in replies} == {504}


def test_a_batch_that_fails_does_not_take_the_server_down(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Runner, asks: Sequence[Ask]) -> list[Decision | InputError]:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", broken)
        assert server.act("cart", GOOD).status_code == 500
    assert server.act("cart", GOOD).status_code == 200


def test_sessions_are_bounded_in_number(folders: dict[str, Path]) -> None:
    server = Server({"cart": folders["cart"]}, max_sessions=3)
    for index in range(5):
        assert server.act("cart", {**GOOD, "session_id": f"s{index}"}).status_code == 200
    sessions = server.repository["cart"].sessions
    assert len(sessions) == 3
    assert not sessions.remove("s0")
    assert sessions.remove("s4")


def test_sessions_are_bounded_in_age(server: Server) -> None:
    sessions = server.repository["cart"].sessions
    now = 0.0
    sessions.clock = lambda: now
    server.act("cart", {**GOOD, "session_id": "old"})
    now = sessions.ttl_s + 1
    server.act("cart", {**GOOD, "session_id": "new"})
    assert len(sessions) == 1


def test_metrics_are_exposed(server: Server) -> None:
    server.act("cart", GOOD)
    server.act("cart", {})
    text = server.call("GET", "/metrics").text
    assert 'lockstep_requests_total{route="/v1/policies/{name}/act",status="200"} 1' in text
    assert 'lockstep_requests_total{route="/v1/policies/{name}/act",status="400"} 1' in text
    assert 'lockstep_batch_rows_count{policy="cart"} 1' in text
    assert 'lockstep_policy_info{policy="cart",version="1"' in text


@pytest.mark.parametrize("wish", [{"max_batch": 0}, {"port": 70_000}, {"request_timeout_s": 0.0}, {"seed": -1}])
def test_configs_that_make_no_sense_are_refused(wish: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wish))):
        ServeConfig(**wish)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
ACT_BODIES = st.fixed_dictionaries(
    {"observation": VALUES | st.lists(st.floats(), min_size=4, max_size=4)},
    optional=dict.fromkeys(("deterministic", "seed", "session_id", "reset", "observations"), VALUES),
)
TENSORS = st.fixed_dictionaries(
    {"name": st.just("observation") | VALUES, "shape": st.just([1, 4]) | VALUES, "datatype": st.just("FP32") | VALUES},
    optional={"data": VALUES | st.lists(st.floats(), min_size=4, max_size=4), "parameters": VALUES},
)
INFER_BODIES = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, max_size=2) | VALUES}, optional={"parameters": VALUES, "outputs": VALUES, "id": VALUES}
)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from([ACT, "/v2/models/cart/infer"]),
    body=st.binary(max_size=60) | (ACT_BODIES | INFER_BODIES | VALUES).map(lambda v: json.dumps(v).encode()),
    length=st.none() | st.integers(-2, 100).map(str) | st.text("0123456789x", max_size=4),
)
def test_no_body_makes_a_5xx(shared: Server, path: str, body: bytes, length: str | None) -> None:
    headers = JSON if length is None else {**JSON, "inference-header-content-length": length}
    reply = shared.call("POST", path, content=body, headers=headers)
    assert reply.status_code < 500, reply.text
    assert "error" in reply.json() or reply.status_code == 200
