"""Small policies of every kind, and a client that calls the application in process."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace
from lockstep.models.control.folder import save_policy
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.server.app import build_app
from lockstep.server.config import ServeConfig
from lockstep.server.repository import Repository

SMALL = NetworkConfig(hidden_sizes=(16, 16))
SPECS = {
    "cart": PolicySpec(
        obs_space=BoxSpace((4,), "float32"), action_space=DiscreteSpace(2), head="categorical", network=SMALL
    ),
    "walker": PolicySpec(
        obs_space=BoxSpace((5,), "float64"),
        action_space=BoxSpace((3,), "float32", (-2.0,), (2.0,)),
        head="gaussian",
        network=SMALL,
        normalise_obs=True,
    ),
    "memory": PolicySpec(
        obs_space=BoxSpace((4,), "float32"),
        action_space=MultiDiscreteSpace((3, 2)),
        head="categorical",
        network=NetworkConfig(hidden_sizes=(16,), recurrent="gru", recurrent_size=9),
        frame_stack=3,
    ),
    "masked": PolicySpec(
        obs_space=DictSpace(
            {
                "position": DiscreteSpace(5),
                "speed": BoxSpace((2,), "float32"),
                "action_mask": BoxSpace((3,), "bool", (0.0,), (1.0,)),
            }
        ),
        action_space=DiscreteSpace(3),
        head="categorical",
        network=SMALL,
    ),
    "twin": PolicySpec(
        obs_space=BoxSpace((4,), "float32"),
        action_space=BoxSpace((1,), "float32", (-1.0,), (1.0,)),
        head="squashed",
        network=SMALL,
        critic=False,
    ),
}


def make_policy(kind: str, seed: int = 0, version: int = 1) -> Policy:
    """A policy whose weights are larger than at initialisation, so that its choices differ."""
    policy = Policy(SPECS[kind], seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    policy.version = version
    return policy.eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy folder of each kind; tests do not write to them."""
    root = tmp_path_factory.mktemp("policies")
    for kind in SPECS:
        save_policy(make_policy(kind), root / kind)
    return {kind: root / kind for kind in SPECS}


class Server:
    """The application with an HTTP client, in one event loop per `run`."""

    def __init__(self, folders: dict[str, Path], key: str = "", **config: Any) -> None:
        self.config = ServeConfig(**{"reload_every_s": 0.0, "seed": 7, **config})
        self.repository = Repository(folders, self.config)
        self.gate = build_app(self.repository, self.config, key=key)

    def run(self, scenario: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def whole() -> Any:
            transport = httpx.ASGITransport(app=self.gate)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                async with asyncio.timeout(30):
                    return await scenario(client)

        return asyncio.run(whole())

    def call(self, method: str, url: str, **kwargs: Any) -> httpx.Response:
        return self.run(lambda client: client.request(method, url, **kwargs))

    def act(self, name: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.call("POST", f"/v1/policies/{name}/act", json=body, **kwargs)

    def infer(self, name: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.call("POST", f"/v2/models/{name}/infer", json=body, **kwargs)


@pytest.fixture(scope="session")
def shared(folders: dict[str, Path]) -> Server:
    """For tests that do not look at what others leave behind (counts, sessions)."""
    return Server(folders)


@pytest.fixture
def server(folders: dict[str, Path]) -> Server:
    return Server(folders)


@contextmanager
def serving(policies: list[str]) -> Iterator[str]:
    """`lockstep serve` as a process; yields host:port, and sees that SIGTERM ends it in order."""
    command = [sys.executable, "-m", "lockstep.cli.main", "serve", *policies, "--port", "0"]
    with tempfile.NamedTemporaryFile("w") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while (found := re.search(r"running on http://(127\.0\.0\.1:\d+)", Path(log.name).read_text())) is None:
                assert process.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            urllib.request.urlopen(f"http://{found[1]}/v2/health/ready", timeout=60).close()
            yield found[1]
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            said = Path(log.name).read_text()
            assert process.returncode == 0, said
            assert "Traceback" not in said
        finally:
            process.kill()
            process.wait()
