"""The page, in a real browser: headless Chromium, driven through the WebDriver protocol by chromedriver."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from lockstep.core.errors import CheckpointError, ConfigError, MissingExtraError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace
from lockstep.interop import export_browser, load_exported
from lockstep.interop.check import random_observations
from lockstep.interop.export import browser
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec

CARTPOLE = PolicySpec(
    obs_space=BoxSpace((4,), "float32", (-4.8, -1e38, -0.4, -1e38), (4.8, 1e38, 0.4, 1e38)),
    action_space=DiscreteSpace(2),
    head="categorical",
)

MEMORY = PolicySpec(
    obs_space=DictSpace({"place": BoxSpace((3,), "float32", (-1.0,), (1.0,)), "cell": DiscreteSpace(4, -1)}),
    action_space=BoxSpace((2,), "float32", (-2.0,), (2.0,)),
    head="gaussian",
    network=NetworkConfig(recurrent="lstm", recurrent_size=8),
)


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """onnxruntime-web from npm, once."""
    pytest.importorskip("onnxscript")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    command = ["npm", "pack", browser.RUNTIME, "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm cannot fetch {browser.RUNTIME}: {done.stderr.strip()[-200:]}")
    return next(folder.glob("*.tgz"))


class Browser:
    """A WebDriver session."""

    def __init__(self, root: str) -> None:
        self.root = root
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {"binary": shutil.which("chromium"), "args": arguments}
        wish = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.session = self._post("/session", wish)["sessionId"]
        self._post(f"/session/{self.session}/timeouts", {"script": 60_000, "pageLoad": 60_000})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self.root + path, json.dumps(body).encode(), {"Content-Type": "json"})
        with urllib.request.urlopen(request, timeout=90) as reply:
            return json.load(reply)["value"]

    def open(self, url: str) -> None:
        """Go there and wait for the page's word that it is ready."""
        self._post(f"/session/{self.session}/url", {"url": url})
        end = time.monotonic() + 60
        while (status := self.value("document.body.dataset.status")) is None and time.monotonic() < end:
            time.sleep(0.1)
        assert status == "ready", self.value("document.body.innerText")

    def value(self, expression: str, *args: Any) -> Any:
        """Of an expression in the page; promises are awaited, `a` is the arguments."""
        script = (
            f"const done = arguments[arguments.length - 1], a = arguments; (async () => ({expression}))().then(done)"
        )
        return self._post(f"/session/{self.session}/execute/async", {"script": script, "args": list(args)})


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("Chromium and chromedriver (Debian: chromium, chromium-driver) are not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}", "--silent"], stdout=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        window = Browser(f"http://127.0.0.1:{port}")
        yield window
        request = urllib.request.Request(f"{window.root}/session/{window.session}", method="DELETE")
        urllib.request.urlopen(request, timeout=30).close()
    finally:
        driver.kill()
        driver.wait(timeout=30)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """`tmp_path` over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_cartpole_is_driven_as_gymnasium_drives_it(page: Browser, served: str, runtime: Path, tmp_path: Path) -> None:
    """The page's episode is Gymnasium's, state by state; and the picture moves by itself."""
    policy = Policy(CARTPOLE, seed=3)
    policy.actor.weights[-1].data *= 100  # decided, not balanced on a tie
    deviations = export_browser(policy, tmp_path / "page", environment="CartPole-v1", runtime=runtime)
    assert {d.name for d in deviations} == {"action", "logprob", "value"}
    page.open(f"{served}/page/")
    begin = [0.01, -0.02, 0.03, 0.04]
    got = page.value("lockstep.cartpole.episode(lockstep.policy, a[0])", begin)
    env: Any = gym.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    env.state = np.array(begin)
    states, actions, fallen = [begin], [], False
    while not fallen and len(actions) < 500:
        actions.append(int(policy.predict(np.array(env.state, np.float32))))
        fallen = env.step(actions[-1])[2]
        states.append([float(x) for x in env.state])
    assert got["actions"] == actions
    assert len(actions) > 8
    np.testing.assert_allclose(got["states"], states, rtol=1e-9, atol=1e-12)

    before = page.value("[document.querySelector('canvas').toDataURL(), document.querySelector('#outputs').innerText]")
    time.sleep(0.5)
    after = page.value("[document.querySelector('canvas').toDataURL(), document.querySelector('#outputs').innerText]")
    assert before[0] != after[0]
    assert "step" in after[1]
    assert "value" in after[1]


@pytest.mark.slow
def test_other_policies_are_forms(page: Browser, served: str, runtime: Path, tmp_path: Path) -> None:
    """A slider moves the observation; what is shown is what the policy does, its memory included."""
    policy = Policy(MEMORY, seed=2)
    export_browser(policy, tmp_path / "page", runtime=runtime)
    page.open(f"{served}/page/")
    assert page.value("document.querySelectorAll('input[type=range]').length") > 0
    rng = np.random.default_rng(0)
    actor = Actor(policy, 1, seed=0)
    page.value("lockstep.policy.reset()")
    for _ in range(3):
        obs = random_observations(policy, 1, rng)
        flat = {k: x.reshape(-1).tolist() for k, x in obs.items()} if isinstance(obs, dict) else obs[0].tolist()
        got = page.value("lockstep.policy.act(a[0])", flat)
        want = actor.act(obs, deterministic=True)
        np.testing.assert_allclose(got["action"], want.env_action.numpy().reshape(-1), atol=1e-5)
        np.testing.assert_allclose(got["value"], want.value, atol=1e-5)
        actor.advance(np.zeros(1, np.bool_))
    move = "i.value = i.max, i.dispatchEvent(new Event('input')), document.querySelector('#act').click()"
    page.value(f"(i => ({move}))(document.querySelector('input[type=range]'))")
    time.sleep(0.3)
    assert "action" in page.value("document.querySelector('#outputs').innerText")


@pytest.mark.slow
def test_a_damaged_folder_is_refused_and_replaced(runtime: Path, tmp_path: Path) -> None:
    policy = Policy(CARTPOLE)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "policy.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be run by Node"):
        load_exported(tmp_path / "page")
    export_browser(policy, tmp_path / "page", runtime=runtime)
    assert [p.name for p in tmp_path.iterdir()] == ["page"]
    assert load_exported(tmp_path / "page").metadata["digest"] == policy.digest()


def test_what_a_page_needs(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    monkeypatch.setattr(browser, "program", lambda name: name)
    with pytest.raises(ConfigError, match="no export wrote"):
        export_browser(policy, tmp_path / "mine")
    (tmp_path / "no.tgz").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="is not onnxruntime-web"):
        export_browser(policy, tmp_path / "page", runtime=tmp_path / "no.tgz")
    monkeypatch.undo()
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"install Node\.js"):
        export_browser(policy, tmp_path / "page")
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("mine", "no.tgz")] == []
