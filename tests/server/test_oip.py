"""The Open Inference Protocol, in process: JSON and binary tensors, errors, metadata."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest

from lockstep.models.control.actor import Actor

from .conftest import Server, make_policy

OBS = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)


def tensor(data: Any = None, **changes: Any) -> dict[str, Any]:
    data = OBS.ravel().tolist() if data is None else data
    entry = {"name": "observation", "shape": [3, 4], "datatype": "FP32", "data": data}
    return {**entry, **changes}


def binary(head: dict[str, Any], *raw: bytes) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(head).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), "content-type": "application/octet-stream"}
    return b"".join([text, *raw]), headers


def binary_input(size: int, **changes: Any) -> dict[str, Any]:
    entry = tensor(parameters={"binary_data_size": size}, **changes)
    del entry["data"]
    return entry


def expected() -> Any:
    return Actor(make_policy("cart"), 3, seed=0).act(OBS, deterministic=True)


@pytest.mark.parametrize("path", ["/v2/models/cart/infer", "/v2/models/cart/versions/1/infer"])
@pytest.mark.parametrize("nested", [False, True])
def test_json_infer(shared: Server, path: str, nested: bool) -> None:
    data = OBS.tolist() if nested else OBS.ravel().tolist()
    reply = shared.call("POST", path, json={"id": "42", "inputs": [tensor(data)]}).json()
    assert (reply["model_name"], reply["model_version"], reply["id"]) == ("cart", "1", "42")
    outputs = {entry["name"]: entry for entry in reply["outputs"]}
    assert outputs["action"] == {
        "name": "action",
        "datatype": "INT64",
        "shape": [3],
        "data": expected().env_action.tolist(),
    }
    assert outputs["logprob"]["data"] == expected().logprob.tolist()
    assert outputs["value"]["data"] == expected().value.tolist()


@pytest.mark.parametrize("encoding", ["", "gzip", "deflate"])
def test_binary_infer(shared: Server, encoding: str) -> None:
    raw = OBS.tobytes()
    outputs = [{"name": "value", "parameters": {"binary_data": True}}, {"name": "action"}]
    body, headers = binary({"inputs": [binary_input(len(raw))], "outputs": outputs}, raw)
    if encoding:
        body = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding](body)
        headers["content-encoding"] = encoding
    reply = shared.call("POST", "/v2/models/cart/infer", content=body, headers=headers)
    length = int(reply.headers["inference-header-content-length"])
    head = json.loads(reply.content[:length])
    assert [entry["name"] for entry in head["outputs"]] == ["value", "action"]
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 12}
    assert reply.content[length:] == expected().value.numpy().tobytes()
    assert head["outputs"][1]["data"] == expected().env_action.tolist()


def test_all_outputs_binary_on_request(shared: Server) -> None:
    body = {"inputs": [tensor()], "parameters": {"binary_data_output": True}}
    reply = shared.infer("cart", body)
    length = int(reply.headers["inference-header-content-length"])
    assert len(reply.content) - length == 3 * 8 + 3 * 4 + 3 * 4


def test_dictionary_observations_and_float64(shared: Server) -> None:
    inputs = [
        {"name": "position", "shape": [1], "datatype": "INT64", "data": [3]},
        {"name": "speed", "shape": [1, 2], "datatype": "FP64", "data": [0.1, -0.2]},
        {"name": "action_mask", "shape": [1, 3], "datatype": "BOOL", "data": [False, True, False]},
    ]
    reply = shared.infer("masked", {"inputs": inputs}).json()
    assert reply["outputs"][0]["data"] == [1]
    raw = [np.int64(3).tobytes(), np.array([0.1, -0.2]).tobytes(), b"\x00\x01\x00"]
    for entry, part in zip(inputs, raw, strict=True):
        del entry["data"]
        entry["parameters"] = {"binary_data_size": len(part)}
    body, headers = binary({"inputs": inputs}, *raw)
    assert shared.call("POST", "/v2/models/masked/infer", content=body, headers=headers).json() == reply
    body, headers = binary({"inputs": inputs}, *raw[:2], b"\x00\x02\x00")
    refused = shared.call("POST", "/v2/models/masked/infer", content=body, headers=headers)
    assert (refused.status_code, refused.json()["field"]) == (400, "action_mask")


def test_sampling_and_sequences_use_sessions(server: Server) -> None:
    actor = Actor(make_policy("memory"), 1, seed=9)
    for step in range(4):
        obs = OBS[step % 3 : step % 3 + 1]
        want = actor.act(obs, deterministic=False)
        actor.advance(np.array([False]))
        parameters = {"deterministic": False, "seed": 9, "sequence_id": 77, "sequence_start": step == 0}
        body = {"inputs": [tensor(obs.ravel().tolist(), shape=[1, 4])], "parameters": parameters}
        body["parameters"]["sequence_end"] = step == 3
        outputs = server.infer("memory", body).json()["outputs"]
        assert outputs[1]["data"] == want.logprob.tolist()
        assert len(server.repository["memory"].sessions) == (0 if step == 3 else 1)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"datatype": "INT64"}, "observation"),
        ({"datatype": "BYTES"}, "observation"),
        ({"datatype": None}, "observation"),
        ({"shape": [4]}, "observation"),
        ({"shape": [4, 3]}, "observation"),
        ({"shape": [0, 4]}, "observation"),
        ({"shape": [-1, 4]}, "observation"),
        ({"shape": [2**40, 4]}, "observation"),
        ({"shape": "3,4"}, "observation"),
        ({"data": [0.0] * 11}, "observation"),
        ({"data": [0.0] * 11 + ["x"]}, "observation"),
        ({"data": [0.0] * 11 + [10**30]}, "observation"),
        ({"data": [True] * 12}, "observation"),
        ({"data": 3}, "observation"),
        ({"name": "observations"}, "inputs[0].name"),
        ({"name": 3}, "inputs[0].name"),
        ({"parameters": {"binary_data_size": 48}}, "observation"),
        ({"parameters": {"shared_memory_region": "a"}}, "shared_memory_region"),
        ({"extra": 1}, "extra"),
    ],
)
def test_bad_tensor_names_its_field(shared: Server, changes: dict[str, Any], field: str) -> None:
    reply = shared.infer("cart", {"inputs": [tensor(**changes)]})
    assert (reply.status_code, reply.json().get("field")) == (400, field), reply.text


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"inputs": []}, "observation"),
        ({"inputs": None}, "inputs"),
        ({"inputs": [3]}, "inputs[0]"),
        ({"inputs": [tensor(), tensor()]}, "inputs[1].name"),
        ({"id": 3}, "id"),
        ({"outputs": 3}, "outputs"),
        ({"outputs": ["action"]}, "outputs[0]"),
        ({"outputs": [{"name": "q"}]}, "outputs[0].name"),
        ({"outputs": [{"name": "action"}] * 2}, "outputs[1].name"),
        ({"outputs": [{"name": "action", "parameters": {"binary_data": 1}}]}, "binary_data"),
        ({"parameters": []}, "parameters"),
        ({"parameters": {"determinstic": True}}, "determinstic"),
        ({"parameters": {"deterministic": "no"}}, "deterministic"),
        ({"parameters": {"seed": 1.5}}, "seed"),
        ({"parameters": {"reset": True}}, "reset"),
        ({"parameters": {"timeout": -1}}, "timeout"),
        ({"parameters": {"sequence_id": [1]}}, "sequence_id"),
        ({"parameters": {"sequence_id": 1, "session_id": "a"}}, "sequence_id"),
        ({"input": []}, "input"),
    ],
)
def test_bad_request_names_its_field(shared: Server, changes: dict[str, Any], field: str) -> None:
    reply = shared.infer("cart", {"inputs": [tensor()], **changes})
    assert (reply.status_code, reply.json().get("field")) == (400, field), reply.text


@pytest.mark.parametrize(
    ("size", "tail", "header"),
    [
        (48, 47, None),
        (48, 49, None),
        (47, 47, None),
        (2**70, 48, None),
        (48, 48, "100000"),
        (48, 48, "-1"),
        (48, 48, "x"),
    ],
)
def test_bad_binary_framing_is_refused(shared: Server, size: int, tail: int, header: str | None) -> None:
    body, headers = binary({"inputs": [binary_input(size)]}, b"\0" * tail)
    if header is not None:
        headers["Inference-Header-Content-Length"] = header
    reply = shared.call("POST", "/v2/models/cart/infer", content=body, headers=headers)
    assert reply.status_code == 400
    assert reply.json()["field"]


def test_binary_nan_names_the_input(shared: Server) -> None:
    obs = OBS.copy()
    obs[1, 2] = np.nan
    body, headers = binary({"inputs": [binary_input(obs.nbytes)]}, obs.tobytes())
    reply = shared.call("POST", "/v2/models/cart/infer", content=body, headers=headers)
    assert (reply.status_code, reply.json()["field"]) == (400, "observation")


def test_metadata_describes_the_policy(shared: Server) -> None:
    assert shared.call("GET", "/v2").json()["name"] == "lockstep"
    meta = shared.call("GET", "/v2/models/masked").json()
    assert meta["versions"] == ["1"]
    assert meta["inputs"] == [
        {"name": "position", "datatype": "INT64", "shape": [-1]},
        {"name": "speed", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "action_mask", "datatype": "BOOL", "shape": [-1, 3]},
    ]
    outputs = shared.call("GET", "/v2/models/twin/versions/1").json()["outputs"]
    assert outputs[0] == {"name": "action", "datatype": "FP32", "shape": [-1, 1]}
    assert [entry["name"] for entry in outputs] == ["action", "logprob"]
    assert shared.call("GET", "/v2/models/cart/config").json()["max_batch_size"] == 256
    index = shared.call("POST", "/v2/repository/index").json()
    assert {entry["name"]: entry["state"] for entry in index}["walker"] == "READY"


def test_statistics_count_rows_and_batches(server: Server) -> None:
    server.infer("cart", {"inputs": [tensor()]})
    entry = server.call("GET", "/v2/models/cart/stats").json()["model_stats"][0]
    assert (entry["inference_count"], entry["execution_count"]) == (3, 1)
    assert entry["inference_stats"]["success"]["count"] == 1
    assert len(server.call("GET", "/v2/models/stats").json()["model_stats"]) == 5


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/cart/versions/9", 404),
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/models/cart/versions/9/infer", 404),
        ("GET", "/v2/models/cart/infer", 405),
        ("POST", "/v1/policies/none/act", 404),
        ("GET", "/nowhere", 404),
        ("GET", "/v2/models/cart/versions/1/ready", 200),
    ],
)
def test_status_of_unknown_things(shared: Server, method: str, path: str, status: int) -> None:
    reply = shared.call(method, path)
    assert reply.status_code == status
    assert status == 200 or reply.json()["error"]


def test_unloaded_models_refuse_and_load_again(server: Server) -> None:
    assert server.call("POST", "/v2/repository/models/cart/unload").status_code == 200
    assert server.infer("cart", {"inputs": [tensor()]}).status_code == 503
    assert server.call("GET", "/v2/health/ready").status_code == 503
    assert server.call("GET", "/v2/health/live").status_code == 200
    assert server.call("POST", "/v2/repository/models/cart/load").status_code == 200
    assert server.infer("cart", {"inputs": [tensor()]}).status_code == 200
