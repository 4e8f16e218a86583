"""A newer policy takes over without a request lost; a damaged one does not."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import httpx
import pytest

from lockstep.core.errors import ConfigError
from lockstep.models.control.folder import save_policy
from lockstep.server.repository import name_folders

from .conftest import Server, make_policy

GOOD = {"observation": [0.1, 0.2, 0.3, 0.4]}
ACT = "/v1/policies/cart/act"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(make_policy("cart"), tmp_path / "cart")
    return tmp_path / "cart"


def test_reload_under_load_drops_nothing(folder: Path) -> None:
    server = Server({"cart": folder}, reload_every_s=0.02)

    async def scenario(client: httpx.AsyncClient) -> list[httpx.Response]:
        watch = asyncio.create_task(server.repository.watch())
        replies: list[httpx.Response] = []

        async def ask() -> None:
            while "3" not in {reply.json()["version"] for reply in replies[-1:]}:
                replies.append(await client.post(ACT, json=GOOD))

        clients = [asyncio.create_task(ask()) for _ in range(4)]
        for version in (2, 3):
            await asyncio.sleep(0.1)
            save_policy(make_policy("cart", seed=version, version=version), folder)
        await asyncio.gather(*clients)
        watch.cancel()
        return replies

    replies = server.run(scenario)
    assert {reply.status_code for reply in replies} == {200}
    digests = {version: make_policy("cart", seed=version, version=version).digest() for version in (2, 3)}
    digests[1] = make_policy("cart").digest()
    assert all(reply.json()["digest"] == digests[int(reply.json()["version"])] for reply in replies)
    assert "3" in {reply.json()["version"] for reply in replies}


def test_sessions_keep_their_state_if_it_fits(tmp_path: Path) -> None:
    save_policy(make_policy("memory"), tmp_path / "memory")
    server = Server({"memory": tmp_path / "memory"})
    for _ in range(3):
        server.act("memory", {**GOOD, "session_id": "a"})
    session = server.repository["memory"].sessions.take("a", 1, None, 0, lambda _: 0)
    before = {name: x.clone() for name, x in session.state.items()}
    save_policy(make_policy("memory", seed=2, version=2), tmp_path / "memory")
    assert server.call("POST", "/v1/policies/memory/reload").json()["changed"]
    session.fit(server.repository["memory"].loaded.policy)
    assert all(bool((session.state[name] == x).all()) for name, x in before.items())
    assert not session.starts.any()
    session.fit(make_policy("cart"))
    assert session.starts.all()
    assert session.position == 3


def test_half_written_folder_keeps_the_old_version(folder: Path, tmp_path: Path) -> None:
    """New config, old weights: what a reader may meet between the writer's two renames."""
    server = Server({"cart": folder})
    save_policy(make_policy("cart", seed=2, version=2), tmp_path / "new")
    shutil.copy(tmp_path / "new" / "config.json", folder / "config.json")
    served = server.repository["cart"]

    async def rounds(_: httpx.AsyncClient) -> None:
        await served.reload_if_changed()

    server.run(rounds)
    assert served.num_failed_reloads == 1
    assert server.act("cart", GOOD).json()["version"] == "1"
    shutil.copy(tmp_path / "new" / "model.safetensors", folder / "model.safetensors")
    server.run(rounds)
    assert server.act("cart", GOOD).json()["version"] == "2"
    assert served.num_reloads == 1


def test_damaged_folder_keeps_the_old_version_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server({"cart": folder})
    (folder / "model.safetensors").write_bytes(b"damaged")
    reply = server.call("POST", "/v1/policies/cart/reload")
    assert reply.status_code == 409
    assert "version 1 serves on" in reply.json()["error"]
    served = server.repository["cart"]

    async def rounds(_: httpx.AsyncClient) -> None:
        for _ in range(4):
            await served.reload_if_changed()

    server.run(rounds)
    assert len([record for record in caplog.records if "serves on" in record.message]) == 1
    assert server.act("cart", GOOD).status_code == 200
    assert 'lockstep_reload_failures_total{policy="cart"} 3' in server.call("GET", "/metrics").text


def test_a_policy_of_another_shape_may_take_over(folder: Path) -> None:
    server = Server({"cart": folder})
    save_policy(make_policy("walker", version=5), folder)
    server.call("POST", "/v1/policies/cart/reload")
    assert server.act("cart", GOOD).status_code == 400
    assert server.act("cart", {"observation": [0.0] * 5}).json()["version"] == "5"


def test_folders_are_named(tmp_path: Path) -> None:
    run = tmp_path / "ppo-cartpole-s1"
    (run / "policy").mkdir(parents=True)
    assert list(name_folders([str(run)])) == ["ppo-cartpole-s1"]
    assert list(name_folders([str(run / "policy")])) == ["ppo-cartpole-s1"]
    assert name_folders([f"best={run}"]) == {"best": run}
    for wishes in ([], [str(run), str(run / "policy")], [f"a b={run}"]):
        with pytest.raises(ConfigError):
            name_folders(wishes)
