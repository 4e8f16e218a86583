"""From the start of a server's process to the first token that a client gets, and the memory it then holds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError, DeadlineError

START_DEADLINE_S = 300.0
POLL_S = 0.05


def measure_starts(model: Path, peer_python: str, threads: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds to the first token, processor seconds until then, resident and peak bytes: ours (`lockstep serve`) and
    `llama_cpp.server`, in turn."""
    found: dict[str, dict[str, list[float]]] = {
        name: {key: [] for key in ("seconds", "cpu", "resident", "peak")} for name in ("ours", "llama_cpp.server")
    }
    for _ in range(rounds):
        for name, figures in found.items():
            port = free_port()
            if name == "ours":
                command = [sys.executable, "-m", "lockstep.cli.main", "serve", str(model), "--port", str(port)]
                command += ["--num-threads", str(threads), "--served-name", "default", "--engine.max-context", "1024"]
            else:
                command = [peer_python, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port)]
                command += ["--n_threads", str(threads), "--n_ctx", "1024", "--model_alias", "default"]
            for key, value in one_start(name, command, port).items():
                figures[key].append(value)
    return found


def one_start(name: str, command: list[str], port: int) -> dict[str, float]:
    """One process: polled until it answers a completion of one token, measured, ended."""
    with tempfile.TemporaryFile() as log:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not _answers(port):
                if process.poll() is not None:
                    log.seek(0)
                    said = log.read().decode(errors="replace")[-2000:]
                    raise ConfigError(f"{name} ended before it served:\n{said}")
                if time.monotonic() - start > START_DEADLINE_S:
                    raise DeadlineError(f"{name}: no token within {START_DEADLINE_S:.0f} s of its start")
                time.sleep(POLL_S)
            seconds = time.monotonic() - start
            return {"seconds": seconds, "cpu": _processor_seconds(process.pid), **_memory(process.pid)}
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    body = json.dumps({"model": "default", "prompt": "abcdefgh", "max_tokens": 1, "temperature": 0.0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer: dict[str, Any] = json.load(reply)
            return bool(answer["choices"])
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return False
        raise ConfigError(f"the server on port {port} answered {error.code}: {error.read()[:500]!r}") from error
    except OSError:
        return False


def _processor_seconds(pid: int) -> float:
    """Of all threads; what another process takes of the machine hardly changes it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> dict[str, float]:
    wanted = {"VmRSS": "resident", "VmHWM": "peak"}
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[key].split()[0]) * 1024.0 for key, name in wanted.items()}
