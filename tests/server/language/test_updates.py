"""Weights, adapters and steps changed while the server runs, from another process, by HTTP alone."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from lockstep.core.errors import FormatError, InputError
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.llm import LLM
from lockstep.interop import shared_tensors
from lockstep.interop.hf.peft import save_adapter
from lockstep.interop.shared_tensors import SharedTensors, read_shared
from lockstep.models.adapter import LoraConfig, new_adapter
from lockstep.models.digest import weights_digest
from lockstep.models.families import build_model, hf_tensors
from tests.server.language.tiny import CONFIG, LiveServer, live, write_model

PROMPT = "hello the world " * 6
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 10, "seed": 3, "return_weight_versions": True}
LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 600, "ignore_eos": True, "seed": 1}

TRAINER = """
import json, sys, urllib.request
from lockstep.interop.shared_tensors import SharedTensors
from lockstep.models.digest import weights_digest
from lockstep.models.families import build_model, hf_tensors

url, config = sys.argv[1], json.load(open(sys.argv[2]))
model = build_model(config, 4)
digest = weights_digest(model)
with SharedTensors(hf_tensors(model, config)) as shared:
    body = json.dumps({"shared_memory": shared.name, "digest": digest, "weight_version": "7"}).encode()
    reply = urllib.request.urlopen(url + "/update_weights_from_shared_memory", body, timeout=60)
    print(reply.status, digest, reply.read().decode())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_model(tmp_path_factory.mktemp("updates") / "tiny")
    model = build_model(CONFIG, 3, trainable=False)
    adapter = new_adapter(model, LoraConfig(rank=4))
    with torch.no_grad():
        for pair in adapter:
            pair.b.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(adapter, folder.parent / "brief")
    engine = EngineConfig(num_pages=300, max_sequences=8, max_step_tokens=128)
    with live(folder, engine=engine, admin=True, lora=(f"brief={folder.parent / 'brief'}",)) as made:
        yield made


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def alone(folder: Path, **body: Any) -> str:
    """What a cold engine on this folder says."""
    llm = LLM(folder, config=EngineConfig(num_pages=60), num_threads=1)
    params = SamplingParams(max_tokens=body["max_tokens"], seed=body["seed"])
    return llm.generate(body["prompt"], params)[0][0].text


def said(http: httpx.Client, **changes: Any) -> dict[str, Any]:
    reply = http.post("/v1/completions", json=BODY | changes)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.slow
def test_another_process_puts_new_weights_in(server: LiveServer, http: httpx.Client, tmp_path: Path) -> None:
    before = http.get("/get_weight_version").json()
    assert before["digest"] == weights_digest(build_model(CONFIG, 3, trainable=False))
    first = said(http)
    assert first["choices"][0]["text"] == alone(server.folder, **BODY)
    (run,) = first["choices"][0]["weight_versions"]
    assert (run["version"], run["digest"]) == (before["version"], before["digest"])
    hits = server.metric("lockstep_prefix_cache_hit_tokens_total")
    said(http)
    assert server.metric("lockstep_prefix_cache_hit_tokens_total") == hits + 48
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, server.url, str(server.folder / "config.json")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    status, digest, text = done.stdout.split(" ", 2)
    assert status == "200"
    # The segment is gone with its writer, and nobody complains about it.
    assert "resource_tracker" not in done.stderr
    assert json.loads(text)["success"] is True
    assert (json.loads(text)["version"], json.loads(text)["digest"]) == (7, digest)
    second = said(http)
    expected = write_model(tmp_path / "new")
    save_file(hf_tensors(build_model(CONFIG, 4), CONFIG), expected / "model.safetensors")
    assert second["choices"][0]["text"] == alone(expected, **BODY) != first["choices"][0]["text"]
    assert second["choices"][0]["weight_versions"] == [{"version": 7, "digest": digest, "num_tokens": 10}]
    assert server.metric("lockstep_prefix_cache_hit_tokens_total") == hits + 48
    # From a folder, and some tensors only.
    reply = http.post("/update_weights_from_disk", json={"model_path": str(server.folder)})
    assert reply.json()["version"] == 8
    assert reply.json()["digest"] == before["digest"]
    assert said(http)["choices"][0]["text"] == first["choices"][0]["text"]
    part = {"model.norm.weight": torch.full((64,), 2.0)}
    save_file(part, tmp_path / "part.safetensors")
    body = {"model_path": str(tmp_path / "part.safetensors"), "partial": True}
    assert http.post("/update_weights_from_disk", json=body).json()["version"] == 9
    other = build_model(CONFIG, 3, trainable=False)
    other.norm.weight.fill_(2.0)  # type: ignore[union-attr, operator]
    assert http.get("/get_weight_version").json()["digest"] == weights_digest(other)
    assert http.post("/update_weights_from_disk", json={"model_path": str(server.folder)}).status_code == 200


def test_a_bad_update_leaves_the_old_weights(server: LiveServer, http: httpx.Client, tmp_path: Path) -> None:
    before, text = http.get("/get_weight_version").json(), said(http)["choices"][0]["text"]
    tensors = hf_tensors(build_model(CONFIG, 5), CONFIG)
    name = "model.layers.1.mlp.down_proj.weight"

    def refused(match: str, tensors: dict[str, torch.Tensor], **body: Any) -> None:
        with SharedTensors(tensors) as shared:
            reply = http.post("/update_weights_from_shared_memory", json={"shared_memory": shared.name, **body})
        message = reply.json()["error"]["message"]
        assert reply.status_code == 400
        assert match in message, message
        assert http.get("/get_weight_version").json() == before

    refused("no tensor 'model.layers.1.mlp.down_proj.weight'", {k: v for k, v in tensors.items() if k != name})
    refused("has shape (64, 8)", {**tensors, name: torch.zeros(64, 8)})
    refused("that the model does not: extra", {**tensors, "extra": torch.zeros(1)})
    refused("NaN or infinity", {**tensors, name: torch.full((64, 96), float("inf"))})
    refused("not 0123", tensors, digest="0123")
    refused("versions must rise", tensors, weight_version=0)
    refused("is not one of this model", {"extra": torch.zeros(1)}, partial=True)
    for path, match in ((tmp_path / "none", "is no model folder"), (tmp_path, "config.json")):
        reply = http.post("/update_weights_from_disk", json={"model_path": str(path)})
        assert reply.status_code == 400
        assert match in reply.json()["error"]["message"]
    other = write_model(tmp_path / "other", rms_norm_eps=1e-3)
    reply = http.post("/update_weights_from_disk", json={"model_path": str(other)})
    assert "another model" in reply.json()["error"]["message"]
    (tmp_path / "cut.safetensors").write_bytes((server.folder / "model.safetensors").read_bytes()[:5000])
    reply = http.post("/update_weights_from_disk", json={"model_path": str(tmp_path / "cut.safetensors")})
    assert "not a readable safetensors" in reply.json()["error"]["message"]
    reply = http.post("/update_weights_from_shared_memory", json={"shared_memory": "none-here"})
    assert "no shared memory segment" in reply.json()["error"]["message"]
    assert said(http)["choices"][0]["text"] == text


def streamed(url: str, into: list[str], body: dict[str, Any]) -> threading.Thread:
    """A stream in a thread; its pieces come into a list, an error as "error"."""

    def read() -> None:
        with httpx.stream("POST", url + "/v1/completions", json=body | {"stream": True}, timeout=60) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    document = json.loads(line[6:])
                    into.append("error" if "error" in document else document["choices"][0]["text"])

    thread = threading.Thread(target=read)
    thread.start()
    deadline = time.monotonic() + 30
    while len(into) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["keep", "recompute", "wait", "abort"])
def test_pause_modes(server: LiveServer, http: httpx.Client, mode: str) -> None:
    expected: list[str] = []
    streamed(server.url, expected, LONG).join()
    pieces: list[str] = []
    thread = streamed(server.url, pieces, LONG)
    assert http.post("/pause", params={"mode": mode}).json() == {"status": "paused"}
    assert http.get("/is_paused").json() == {"is_paused": True}
    if mode in ("keep", "recompute"):
        time.sleep(0.2)
        num = len(pieces)
        time.sleep(0.3)
        assert len(pieces) == num < len(expected)
    else:
        thread.join(20)
        assert not thread.is_alive()
    assert http.post("/pause", json={"mode": mode}).status_code == 200
    assert http.post("/resume").json() == {"status": "resumed"}
    thread.join(60)
    assert not thread.is_alive()
    assert http.get("/is_paused").json() == {"is_paused": False}
    assert (pieces[-1] == "error") == (mode == "abort")
    assert ("".join(pieces) == "".join(expected)) == (mode != "abort")


@pytest.mark.slow
def test_sleep_gives_memory_back_and_samples_go_on(server: LiveServer, http: httpx.Client) -> None:
    expected: list[str] = []
    streamed(server.url, expected, LONG).join()
    pieces: list[str] = []
    thread = streamed(server.url, pieces, LONG)
    assert http.post("/sleep", params={"level": "1"}).status_code == 200
    assert http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert server.service.engine._engine._runner._cache is None
    assert "only 1 is supported" in http.post("/sleep?level=2").json()["error"]["message"]
    time.sleep(0.2)
    num = len(pieces)
    assert num < len(expected)
    assert http.post("/wake_up").status_code == 200
    assert http.get("/is_sleeping").json() == {"is_sleeping": False}
    thread.join(60)
    assert "".join(pieces) == "".join(expected)


def test_an_update_in_the_middle_of_a_text(server: LiveServer, http: httpx.Client) -> None:
    """With "wait" a text is of one version; with "keep" of two, and each token says of which."""
    for mode in ("wait", "keep"):
        found: list[Any] = []
        body = LONG | {"return_weight_versions": True}

        def ask(found: list[Any] = found, body: dict[str, Any] = body) -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                found.append(said(client, **body))

        thread = threading.Thread(target=ask)
        running = server.service.metrics.num_active
        thread.start()
        while server.service.metrics.num_active == running:
            time.sleep(0.005)
        time.sleep(0.1)
        reply = http.post("/update_weights_from_disk", json={"model_path": str(server.folder), "pause_mode": mode})
        assert reply.status_code == 200, reply.text
        thread.join(60)
        runs = found[0]["choices"][0]["weight_versions"]
        assert sum(run["num_tokens"] for run in runs) == 600
        version = reply.json()["version"]
        assert [run["version"] for run in runs] == ([version - 1] if mode == "wait" else [version - 1, version])


@pytest.mark.slow
def test_adapters_are_models_of_their_names(server: LiveServer, http: httpx.Client, tmp_path: Path) -> None:
    folder = server.folder.parent / "brief"
    import openai

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", _strict_response_validation=True)
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"tiny", "brief"}
    assert http.get("/v1/models/brief").json()["parent"] == "tiny"
    llm = LLM(server.folder, config=EngineConfig(num_pages=60), num_threads=1)
    llm.load_adapter("brief", folder)
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=10, seed=3), adapter="brief")[0][0].text
    reply = client.completions.create(model="brief", prompt=PROMPT, max_tokens=10, seed=3)
    assert (reply.model, reply.choices[0].text) == ("brief", expected)
    assert said(http)["choices"][0]["text"] != expected
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "return_weight_versions": True}
    document = http.post("/v1/chat/completions", json=chat | {"model": "brief"}).json()
    assert document["model"] == "brief"
    digest = http.get("/get_weight_version").json()["adapters"]["brief"]["digest"]
    assert {run["digest"] for run in document["choices"][0]["weight_versions"]} == {digest}
    assert http.post("/v1/messages", json=chat | {"model": "brief"}).json()["model"] == "brief"
    assert http.post("/v1/responses", json={"input": "a", "model": "brief"}).json()["model"] == "brief"
    assert "without an adapter" in http.post("/v1/embeddings", json={"input": "a", "model": "brief"}).text
    assert http.post("/v1/completions", json=BODY | {"model": "none"}).status_code == 404

    load = {"lora_name": "second", "lora_path": str(folder)}
    assert http.post("/v1/load_lora_adapter", json=load).text == "Success: LoRA adapter 'second' added successfully."
    assert said(http, model="second")["choices"][0]["text"] == expected
    assert "is taken" in http.post("/v1/load_lora_adapter", json=load).json()["error"]["message"]
    assert http.post("/v1/load_lora_adapter", json=load | {"load_inplace": True}).status_code == 200
    assert "is taken" in http.post("/v1/load_lora_adapter", json=load | {"lora_name": "tiny"}).text
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/none"}).status_code == 404
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text("{}")
    assert "peft_type" in http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(bad)}).text
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "second"}).status_code == 200
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "second"}).status_code == 404
    assert http.post("/v1/completions", json=BODY | {"model": "second"}).status_code == 404


def test_without_admin_nothing_can_be_changed(tmp_path: Path) -> None:
    with live(write_model(tmp_path / "tiny"), engine=EngineConfig(num_pages=60)) as server:
        for path in ("/pause", "/sleep", "/update_weights_from_disk", "/v1/load_lora_adapter"):
            reply = httpx.post(server.url + path, json={})
            assert (reply.status_code, "--admin" in reply.text) == (403, True)
        assert httpx.get(server.url + "/get_weight_version").json()["version"] == 0


def test_damaged_segments_are_told() -> None:
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.zeros(0), "c": torch.ones(3).bfloat16()}
    with SharedTensors(tensors) as shared:
        whole = bytes(shared._memory.buf)

    def read(data: bytes) -> dict[str, torch.Tensor]:
        return shared_tensors._read(SimpleNamespace(buf=memoryview(bytearray(data)), size=len(data)), "segment")  # type: ignore[arg-type]

    assert all(torch.equal(value, tensors[name]) for name, value in read(whole).items())
    for old, new, match in (
        (b"[2, 3]", b"[2, 4]", "told wrongly"),
        (b"I64", b"I99", "told wrongly"),
        (b'"a"', b'"a ', "not JSON"),
        (b"[0, 48]", b"[0, 99]", "told wrongly"),
        (b"[48, 48]", b"[48, 40]", "told wrongly"),
        (whole[:8], b"\xff" * 8, "header of"),
    ):
        assert old in whole
        with pytest.raises(FormatError, match=match):
            read(whole.replace(old, new, 1))
    for size in (0, 7, 20):
        with pytest.raises(FormatError):
            read(whole[:size])
    with pytest.raises(InputError, match="no shared memory segment"):
        read_shared(shared.name)
    with pytest.raises(InputError, match="is no name"):
        read_shared("../etc/passwd")
    with pytest.raises(InputError, match="complex64"):
        SharedTensors({"a": torch.zeros(2, dtype=torch.complex64)})


def test_a_run_that_is_served_while_it_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    write_model(run / "model", num_hidden_layers=1)
    (run / "run.json").write_text("{}")

    def exchange(number: int, **config: Any) -> None:
        """As a training session does."""
        newer = write_model(tmp_path / f"newer{number}", num_hidden_layers=1, **config)
        (run / "model").rename(tmp_path / f"older{number}")
        newer.rename(run / "model")

    def until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    engine = EngineConfig(num_pages=20, max_sequences=2)
    with live(run, engine=engine, reload_every_s=0.02) as server, httpx.Client(base_url=server.url) as http:

        def served() -> dict[str, Any]:
            return http.get("/get_weight_version").json()

        before = served()
        exchange(1, initializer_range=0.1)
        until(lambda: served()["version"] == before["version"] + 1)
        assert served()["digest"] != before["digest"]
        assert said(http)["choices"][0]["text"] == alone(run, **BODY)
        # What does not fit is told once; what was served before serves on, until there is something that does.
        exchange(2, intermediate_size=128)
        until(lambda: "left alone until it changes again" in caplog.text)
        assert said(http)["choices"][0]["weight_versions"][0]["version"] == before["version"] + 1
        exchange(3)
        until(lambda: served()["version"] == before["version"] + 2)
        assert caplog.text.count("left alone") == 1
        assert served()["digest"] == before["digest"]
