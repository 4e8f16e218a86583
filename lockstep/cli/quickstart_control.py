"""`lockstep quickstart control`: train CartPole, show the curve, serve the policy, ask it once by the public protocol."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.api import train
from lockstep.cli.train import report
from lockstep.core.errors import ConfigError, DeadlineError, MissingExtraError
from lockstep.rl.session import Result
from lockstep.runs.plot import Curve, plot_curves
from lockstep.runs.record import read_run

TARGET_RETURN = 475.0
START_DEADLINE_S = 60.0
OBSERVATION = [0.02, -0.01, 0.03, 0.04]


def main(args: Sequence[str]) -> int:
    if args and args[0] in ("-h", "--help"):
        print("usage: lockstep quickstart control   (no further arguments; trains the recipe ppo-cartpole)")
        return 0
    if args:
        raise ConfigError(
            f"lockstep quickstart control takes no arguments; got {list(args)}; see lockstep train --help"
        )
    print("1. train: PPO on CartPole-v1\n")
    run = train("ppo-cartpole")
    report(run)
    steps, returns = read_run(run.path).series("return")
    try:
        picture = plot_curves({"ppo-cartpole": [Curve(steps, returns)]}, run.path / "curve.png", title="CartPole-v1")
        print(f"learning curve   {picture}")
    except MissingExtraError as error:
        print(f"learning curve   not drawn: {error}")
    print("\n2. serve it and ask through the Open Inference Protocol\n")
    reply = serve_once(run.path)
    print(json.dumps(reply, indent=2))
    assert isinstance(run.result, Result)
    evaluation = run.result.evaluation
    assert evaluation is not None
    good = evaluation.mean >= TARGET_RETURN
    verdict = "solved" if good else "NOT solved"
    print(f"\n{verdict}: mean return {evaluation} against a target of {TARGET_RETURN:.0f}")
    return 0 if good else 1


def serve_once(run: Path) -> Any:
    """Start `lockstep serve` on a free port, send one inference request, stop it; returns the reply's JSON."""
    port = free_port()
    command = [sys.executable, "-m", "lockstep.cli.main", "serve", str(run), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_ready(f"{base}/v2/health/ready", process)
        models = _call(f"{base}/v1/policies")["policies"]
        name = models[0]["name"]
        body = {"inputs": [{"name": "observation", "shape": [1, 4], "datatype": "FP32", "data": OBSERVATION}]}
        print(f"POST {base}/v2/models/{name}/infer  {json.dumps(body)}")
        return _call(f"{base}/v2/models/{name}/infer", body)
    finally:
        stop(process)


def stop(process: subprocess.Popen[str]) -> None:
    """Ask it to end, and end it."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()


def wait_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            error = process.stderr.read() if process.stderr else ""
            raise DeadlineError(f"the server stopped while starting (status {process.returncode}): {error[-2000:]}")
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise DeadlineError(
        f"the server was not ready within {START_DEADLINE_S:.0f} s; run `lockstep serve` by hand to see why"
    )


def _call(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
