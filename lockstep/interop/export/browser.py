"""A policy as a page: a folder that any web server can hand out, in which onnxruntime-web runs the policy.

    index.html page.js policy.js cartpole.js form.js     ours
    policy.onnx policy.json                              the policy, and what it is
    ort/                                                 onnxruntime-web, from npm

The folder is checked under Node, by the files that the page loads, before it is kept.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep import kernels
from lockstep.core.env import child_environment
from lockstep.core.errors import CheckpointError, ConfigError, DeadlineError, MissingExtraError
from lockstep.interop.check import Deviation, compare, tolerance_of
from lockstep.interop.export.child import Child
from lockstep.interop.exported import Arrays, load_exported
from lockstep.interop.files import folder_replaced_when_checked
from lockstep.interop.onnx_file import write_onnx
from lockstep.interop.program import PolicyProgram, one_thread
from lockstep.models.control.policy import Policy

RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
DOCUMENT = "policy.json"
PAGE = Path(__file__).with_name("page")
WORKER = Path(__file__).with_name("browser_worker.mjs")


def export_browser(
    policy: Policy,
    path: Path | str,
    *,
    distribution: bool = False,
    environment: str = "",
    runtime: Path | None = None,
) -> list[Deviation]:
    """Write the folder `path`; an earlier export in its place is replaced.

    Args:
        policy: written as by `export_onnx`.
        path: of the folder.
        distribution: also yield the parameters of the action distribution.
        environment: id; the page of `CartPole-v1` draws and drives it, others are forms.
        runtime: a file that `npm pack onnxruntime-web` wrote, instead of asking npm for it.

    Raises:
        ExportError: the page's policy did something else than the policy; nothing is left.
        ConfigError: the path cannot be written, or `runtime` is no such file.
        MissingExtraError: npm, node, onnx or onnxscript are not there.
        DeadlineError: npm took over five minutes.
    """
    path = Path(path)
    program("node")
    with one_thread(), folder_replaced_when_checked(path, DOCUMENT) as temporary:
        for source in sorted(PAGE.iterdir()):
            shutil.copyfile(source, temporary / source.name)
        add_runtime(temporary / "ort", runtime)
        write_onnx(policy, temporary / "policy.onnx", distribution=distribution)
        made = PolicyProgram(policy, exactness="portable", distribution=distribution)
        document = {**json.loads(made.metadata(policy, "browser")), "environment": environment}
        document["output_shapes"] = _shapes(made)
        (temporary / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")
        return compare(policy, load_exported(temporary), tolerance=tolerance_of(policy))


def _shapes(made: PolicyProgram) -> dict[str, Any]:
    """dtype and shape of a row of each output."""
    with torch.no_grad(), kernels.force("traceable"):
        outputs = made({port.name: torch.from_numpy(port.zeros(1)) for port in made.inputs})
    return {name: [str(x.numpy().dtype), list(x.shape[1:])] for name, x in outputs.items()}


def program(name: str) -> str:
    """Path of `npm` or `node`.

    Raises:
        MissingExtraError: it is not installed.
    """
    found = shutil.which(name)
    if found is None:
        raise MissingExtraError(f"{name!r} is needed for --to browser; install Node.js 18 or newer, which brings it")
    return found


def add_runtime(folder: Path, archive: Path | None, deadline_s: float = 300.0) -> None:
    """Put onnxruntime-web's files into `folder`.

    Raises:
        ConfigError: npm refused, or the archive lacks the files.
        DeadlineError: npm took too long.
    """
    folder.mkdir()
    with tempfile.TemporaryDirectory() as place:
        if archive is None:
            command = [program("npm"), "pack", RUNTIME, "--silent", "--pack-destination", place]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, cwd=place)
            except subprocess.TimeoutExpired as error:
                raise DeadlineError(
                    f"npm took over {deadline_s:.0f} s for {RUNTIME}; try again, or give --runtime a file of `npm pack`"
                ) from error
            if done.returncode:
                raise ConfigError(f"npm could not fetch {RUNTIME}: {done.stderr.strip()[-400:]}")
            archive = next(Path(place).glob("*.tgz"))
        try:
            with tarfile.open(archive) as tar:
                for name in RUNTIME_FILES:
                    member = tar.extractfile(f"package/dist/{name}")
                    assert member is not None
                    (folder / name).write_bytes(member.read())
        except (OSError, tarfile.TarError, KeyError, AssertionError) as error:
            raise ConfigError(
                f"{archive} is not onnxruntime-web: {error}; write it with: npm pack {RUNTIME}"
            ) from error


class BrowserProcess:
    """A page's policy at work under Node. Calls are inputs by name -> outputs by name, N rows each.

    Raises:
        CheckpointError: the folder is damaged.
        MissingExtraError: there is no Node.
    """

    def __init__(self, path: Path, deadline_s: float = 120.0) -> None:
        self.path = path
        self._child = Child([program("node"), WORKER, path.resolve()], "Node", child_environment(), deadline_s)
        self.text = self._receive()
        self.outputs = json.loads(self.text)["output_shapes"]

    def __call__(self, inputs: Arrays) -> Arrays:
        return self._ask(inputs, 0)[0]

    def seconds(self, inputs: Arrays, repeat: int) -> float:
        """Of the fastest of `repeat` calls with the first row, measured inside of Node."""
        return self._ask({name: x[:1] for name, x in inputs.items()}, repeat)[1]

    def _ask(self, inputs: Arrays, repeat: int) -> tuple[Arrays, float]:
        num = len(next(iter(inputs.values())))
        flat = {name: x.reshape(-1).tolist() for name, x in inputs.items()}
        self._child.send((json.dumps({"inputs": flat, "num": num, "repeat": repeat}) + "\n").encode())
        reply = json.loads(self._receive())
        outputs = {
            name: np.array(reply["outputs"][name], dtype).reshape(num, *shape)
            for name, (dtype, shape) in self.outputs.items()
        }
        return outputs, float(reply["seconds"])

    def _receive(self) -> str:
        line = self._child.line()
        if not line:
            raise CheckpointError(f"{self.path} cannot be run by Node: {self._child.reason()}")
        return line.decode()
