"""`lockstep bench server`: the policy server under many concurrent clients, beside the policy itself and bare HTTP."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lockstep.cli.figures import measured_with
from lockstep.cli.http_load import GRACE_S, LoadResult, LoadWish
from lockstep.core.errors import ConfigError, DeadlineError
from lockstep.core.extras import require
from lockstep.core.spaces import BoxSpace, DiscreteSpace
from lockstep.core.tree import tree_map
from lockstep.models.control.actor import Actor
from lockstep.models.control.folder import load_policy, save_policy
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import PolicySpec

START_DEADLINE_S = 60.0
RAW_SECONDS = 0.5
SIDE_SECONDS = 10.0
NAME = "bench"


@dataclass(frozen=True)
class BenchServerArgs:
    """Measure the policy server: requests per second and latency under concurrent keep-alive clients."""

    policy: Annotated[str, tyro.conf.Positional] = ""
    """Run directory or policy folder (default: a fresh 4-64-64-2 policy in the shape of CartPole's)."""
    clients: int = 64
    """Connections, each with one request out at any time."""
    seconds: float = 60.0
    """Time under load of /act and of /infer, each, in seconds; bare HTTP and binary tensors get at most 10."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class RawRate:
    """The policy without a server, one thread: decisions per second for one row a call and for a batch a call."""

    single_per_s: float
    predict_per_s: float
    batch_rows: int
    batched_rows_per_s: float


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(BenchServerArgs, args=list(args), prog="lockstep bench server")
    if wish.clients < 1 or not wish.seconds > 0:
        raise ConfigError(f"clients={wish.clients} and seconds={wish.seconds} must be above 0")
    require("uvicorn", extra="serve")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(wish.policy) if wish.policy else _fresh_policy(Path(scratch))
        policy = load_policy(folder)
        raw = measure_raw(policy, wish.clients)
        with served(folder) as port:
            results = {}
            for title, requests, seconds in _plan(policy, wish, port):
                results[title] = measure_load(port, requests, seconds)
            mean_rows = _mean_batch(port)
    print(report(wish, raw, results, mean_rows))
    if wish.json is not None:
        _write(wish, raw, results, mean_rows)
    return 1 if any(result.num_errors for result in results.values()) else 0


def measure_raw(policy: Policy, num_rows: int) -> RawRate:
    """Decisions per second of the policy in this process, best of three."""
    one, many = Actor(policy, 1, seed=0), Actor(policy, num_rows, seed=0)
    obs = example_rows(policy, num_rows)
    first = tree_map(lambda x: x[:1], obs)
    row = tree_map(lambda x: x[0], obs)
    return RawRate(
        single_per_s=_rate(lambda: one.act(first, deterministic=True)),
        predict_per_s=_rate(lambda: policy.predict(row)),
        batch_rows=num_rows,
        batched_rows_per_s=num_rows * _rate(lambda: many.act(obs, deterministic=True)),
    )


def example_rows(policy: Policy, num_rows: int) -> Any:
    """Random observations that the policy's interface takes."""
    from lockstep.server.tensors import interface_of

    generator = np.random.default_rng(0)
    example = interface_of(policy).example(num_rows)
    return tree_map(
        lambda x: generator.standard_normal(x.shape).astype(np.float32) if x.dtype.kind == "f" else x, example
    )


def measure_load(port: int, requests: list[str], seconds: float) -> LoadResult:
    """One run of the load client, after a second of warming up.

    Raises:
        DeadlineError: the client did not end in time.
    """
    for duration in (1.0, seconds):
        wish = LoadWish("127.0.0.1", port, requests, duration)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "lockstep.cli.http_load"],
                input=json.dumps(asdict(wish)),
                capture_output=True,
                text=True,
                timeout=duration + 2 * GRACE_S,
                check=True,
            )
        except subprocess.TimeoutExpired as error:
            raise DeadlineError(f"the load client did not end {2 * GRACE_S:.0f} s after its time") from error
    return LoadResult(**json.loads(done.stdout))


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """`lockstep serve` as a process on a free port.

    Raises:
        DeadlineError: it is not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "lockstep.cli.main", "serve", f"{NAME}={folder}", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_DEADLINE_S
            while not _is_ready(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise DeadlineError(
                        f"the server was not ready within {START_DEADLINE_S:.0f} s: {log.read()[-2000:]}"
                    )
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)


def report(wish: BenchServerArgs, raw: RawRate, results: dict[str, LoadResult], mean_rows: float) -> str:
    """The table."""
    lines = [
        "",
        f"policy server, {wish.clients} concurrent keep-alive clients, one server process",
        "",
        f"{'':<26}{'requests':>10}{'errors':>8}{'requests/s':>12}{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}{'max ms':>9}",
    ]
    for title, r in results.items():
        lines.append(
            f"{title:<26}{r.num_requests:>10,}{r.num_errors:>8,}{r.rate:>12,.0f}"
            f"{r.p50_ms:>9.2f}{r.p90_ms:>9.2f}{r.p99_ms:>9.2f}{r.max_ms:>9.2f}"
        )
        if r.error:
            lines.append(f"  first error: {r.error.splitlines()[0]}")
    lines += [
        "",
        f"the policy itself, no server: {raw.single_per_s:,.0f} single decisions/s by Actor.act, "
        f"{raw.predict_per_s:,.0f} by predict; {raw.batched_rows_per_s:,.0f} rows/s in batches of {raw.batch_rows}",
        f"mean batch under load: {mean_rows:.1f} rows",
    ]
    return "\n".join(lines)


def _plan(policy: Policy, wish: BenchServerArgs, port: int) -> list[tuple[str, list[str], float]]:
    """(title, one request per client, seconds) of each run."""
    obs = example_rows(policy, wish.clients)
    side = min(SIDE_SECONDS, wish.seconds)
    rows = [tree_map(lambda x, i=i: x[i], obs) for i in range(wish.clients)]
    act = [_post(port, f"/v1/policies/{NAME}/act", {"observation": tree_map(lambda x: x.tolist(), r)}) for r in rows]
    infer = [_post(port, f"/v2/models/{NAME}/infer", _infer_body(policy, r)) for r in rows]
    live = [f"GET /v2/health/live HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n\r\n"] * wish.clients
    return [
        ("bare HTTP (health/live)", live, side),
        ("POST act (JSON)", act, wish.seconds),
        ("POST v2 infer (JSON)", infer, wish.seconds),
    ]


def _infer_body(policy: Policy, row: Any) -> dict[str, Any]:
    from lockstep.server.tensors import interface_of

    inputs = []
    for spec in interface_of(policy).inputs:
        array = row[spec.name] if isinstance(row, dict) else row
        entry = {"name": spec.name, "shape": [1, *spec.shape], "datatype": spec.datatype}
        inputs.append({**entry, "data": np.asarray(array).ravel().tolist()})
    return {"inputs": inputs}


def _post(port: int, path: str, document: Any) -> str:
    body = json.dumps(document)
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}"


def _fresh_policy(scratch: Path) -> Path:
    spec = PolicySpec(obs_space=BoxSpace((4,), "float32"), action_space=DiscreteSpace(2), head="categorical")
    save_policy(Policy(spec, seed=0), scratch / "policy")
    return scratch / "policy"


def _rate(call: Any) -> float:
    rates = []
    call()
    for _ in range(3):
        start, num = time.perf_counter(), 0
        while time.perf_counter() - start < RAW_SECONDS:
            for _ in range(20):
                call()
            num += 20
        rates.append(num / (time.perf_counter() - start))
    return max(rates)


def _is_ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def _mean_batch(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/{NAME}/stats", timeout=10) as reply:
        entry = json.loads(reply.read())["model_stats"][0]
    return entry["inference_count"] / max(1, entry["execution_count"])


def _write(wish: BenchServerArgs, raw: RawRate, results: dict[str, LoadResult], mean_rows: float) -> None:
    assert wish.json is not None
    packages = ("fastapi", "starlette", "uvicorn", "pydantic")
    document = {
        "benchmark": "server",
        "clients": wish.clients,
        "policy": wish.policy or "fresh 4-64-64-2",
        "raw": asdict(raw),
        "results": {title: {**asdict(r), "requests_per_s": r.rate} for title, r in results.items()},
        "mean_batch_rows": mean_rows,
        "versions": measured_with() | {package: importlib.metadata.version(package) for package in packages},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    wish.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
