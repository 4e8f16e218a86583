"""The real process on a loopback port, asked by the protocol's own client."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.models.control.actor import Actor

from .conftest import make_policy, serving

pytestmark = pytest.mark.slow
OBS = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)


def triton() -> Any:
    """The package, imported by the first test that uses it."""
    return pytest.importorskip("tritonclient.http")


@pytest.fixture(scope="module")
def live(folders: dict[str, Path]) -> Iterator[str]:
    with serving([f"cart={folders['cart']}", str(folders["memory"])]) as address:
        yield address


@pytest.fixture
def client(live: str) -> Iterator[Any]:
    with triton().InferenceServerClient(live) as client:
        yield client


def test_triton_client_sees_the_server(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("cart")
    assert client.is_model_ready("cart", "1")
    assert not client.is_model_ready("none")
    assert client.get_server_metadata()["name"] == "lockstep"
    assert client.get_model_metadata("cart")["inputs"][0]["name"] == "observation"
    assert client.get_model_config("cart")["max_batch_size"] > 0
    assert {entry["name"] for entry in client.get_model_repository_index()} == {"cart", "memory"}
    client.load_model("cart")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_triton_client_infers(client: Any, binary: bool, compression: str | None) -> None:
    tensor = triton().InferInput("observation", [3, 4], "FP32")
    tensor.set_data_from_numpy(OBS, binary_data=binary)
    wanted = [triton().InferRequestedOutput(name, binary_data=binary) for name in ("action", "logprob", "value")]
    reply = client.infer("cart", [tensor], outputs=wanted, request_compression_algorithm=compression, request_id="9")
    expected = Actor(make_policy("cart"), 3, seed=0).act(OBS, deterministic=True)
    assert reply.get_response()["id"] == "9"
    assert np.array_equal(reply.as_numpy("action"), expected.env_action.numpy())
    assert np.array_equal(reply.as_numpy("logprob"), expected.logprob.numpy())
    assert np.array_equal(reply.as_numpy("value"), expected.value.numpy())


def test_triton_client_samples_a_sequence(client: Any) -> None:
    actor = Actor(make_policy("memory"), 1, seed=4)
    tensor = triton().InferInput("observation", [1, 4], "FP32")
    for step in range(4):
        tensor.set_data_from_numpy(OBS[step % 3 : step % 3 + 1])
        reply = client.infer(
            "memory",
            [tensor],
            sequence_id=31,
            sequence_start=step == 0,
            sequence_end=step == 3,
            parameters={"deterministic": False, "seed": 4},
        )
        expected = actor.act(OBS[step % 3 : step % 3 + 1], deterministic=False)
        actor.advance(np.array([False]))
        assert np.array_equal(reply.as_numpy("logprob"), expected.logprob.numpy())


def test_triton_client_is_told_what_is_wrong(client: Any) -> None:
    tensor = triton().InferInput("observation", [1, 3], "FP32")
    tensor.set_data_from_numpy(OBS[:1, :3].copy())
    with pytest.raises(triton().InferenceServerException, match=r"observation: expected shape \[-1, 4\]"):
        client.infer("cart", [tensor])


def test_connection_survives_garbage(live: str) -> None:
    host, port = live.split(":")
    for garbage in (b"\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"\x16\x03\x01" * 50):
        with socket.create_connection((host, int(port)), timeout=60) as peer:
            peer.sendall(garbage)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(4096):
                pass
    urllib.request.urlopen(f"http://{live}/v2/health/ready", timeout=60).close()
