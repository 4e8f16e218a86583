"""Policies for phones and small devices: LiteRT (`.tflite`, what TensorFlow Lite is called now) and ExecuTorch (`.pte`).

    policy --PolicyProgram--> one row, flat --torch.export--> .pt2 --converter's interpreter--> file
    file --the same interpreter's runtime--> compared with the policy

The converters pin versions of what others need too (jax, torchao, pydantic), print, and end the process when they fail
badly; so they run in a process of their own, by an interpreter that may be another one: `LOCKSTEP_LITERT_PYTHON`,
`LOCKSTEP_EXECUTORCH_PYTHON`.
"""

from __future__ import annotations

import io
import json
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lockstep import kernels
from lockstep.core.env import child_environment, converter_python
from lockstep.core.errors import CheckpointError, DeadlineError, ExportError, MissingExtraError
from lockstep.interop.check import Deviation, compare, tolerance_of
from lockstep.interop.export.child import Child, reason_of
from lockstep.interop.exported import Arrays, load_exported
from lockstep.interop.files import replaced_when_checked
from lockstep.interop.program import METADATA_KEY, PolicyProgram, one_thread
from lockstep.models.control.policy import Policy

WORKER = Path(__file__).with_name("edge_worker.py")


@dataclass(frozen=True)
class Toolchain:
    """A converter with its runtime.

    >>> LITERT.suffix
    '.tflite'
    """

    kind: str
    """Word that the worker knows it by, and the extra of ours that installs it."""
    suffix: str
    """Of its files."""
    packages: tuple[str, ...]
    """Modules that its interpreter must have."""

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return converter_python(self.kind)


LITERT = Toolchain("litert", ".tflite", ("litert_torch", "ai_edge_litert"))
EXECUTORCH = Toolchain("executorch", ".pte", ("executorch",))


def export_litert(policy: Policy, path: Path | str, *, distribution: bool = False) -> list[Deviation]:
    """Write the whole pipeline of `policy` to a `.tflite` file for one row at a time.

    Inputs `args_0`, `args_1`, ... and outputs `output_0`, ... of the file's only signature are those of `PolicyProgram` in
    its order; 64-bit integers are 32-bit ones. The metadata of `export_onnx`, which names them, is the associated file
    `lockstep.json`.

    Raises:
        ExportError: the converter refused, or the file did something else than the policy; it is deleted.
        ConfigError: the path cannot be written.
        MissingExtraError: the interpreter has no litert-torch.
        DeadlineError: the converter took over ten minutes.
    """
    return _export(LITERT, policy, Path(path), distribution)


def export_executorch(policy: Policy, path: Path | str, *, distribution: bool = False) -> list[Deviation]:
    """Write the whole pipeline of `policy` to a `.pte` file for one row at a time, products by XNNPACK.

    Inputs and outputs of the method `forward` are those of `PolicyProgram` in its order; the method `lockstep` returns the
    metadata of `export_onnx`, which names them.

    Raises:
        As `export_litert`, for executorch.
    """
    return _export(EXECUTORCH, policy, Path(path), distribution)


def _export(toolchain: Toolchain, policy: Policy, path: Path, distribution: bool) -> list[Deviation]:
    check_installed(toolchain)
    program = PolicyProgram(policy, exactness="portable", distribution=distribution)
    with (
        one_thread(),
        replaced_when_checked(path, toolchain.suffix) as temporary,
        tempfile.TemporaryDirectory() as folder,
    ):
        source = Path(folder) / "program.pt2"
        with warnings.catch_warnings():
            # Internals of torch.export call functions that torch itself has deprecated.
            warnings.simplefilter("ignore")
            traced, dtypes = _flat(program)
            document = {**json.loads(program.metadata(policy, toolchain.kind)), "output_dtypes": dtypes}
            torch.export.save(traced, str(source), extra_files={METADATA_KEY: json.dumps(document)})
        _convert(toolchain, source, temporary)
        exported = load_exported(temporary)
        return compare(policy, exported, tolerance=tolerance_of(policy))


class _Flat(nn.Module):
    """The program with inputs and outputs by place."""

    def __init__(self, program: PolicyProgram) -> None:
        super().__init__()
        self.program = program

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = {port.name: x for port, x in zip(self.program.inputs, inputs, strict=True)}
        outputs = self.program(named)
        return tuple(outputs[name] for name in self.program.output_names)


def _flat(program: PolicyProgram) -> tuple[torch.export.ExportedProgram, list[str]]:
    """One row of the program by place, and the outputs' dtypes."""
    example = tuple(torch.from_numpy(port.zeros(1)) for port in program.inputs)
    flat = _Flat(program).eval()
    with torch.no_grad(), kernels.force("traceable"):
        dtypes = [str(output.numpy().dtype) for output in flat(*example)]
        traced = torch.export.export(flat, example)
    # A list of tensors as an operator's result has no form in LiteRT where the list has one entry.
    return traced.run_decompositions({torch.ops.aten.split_with_sizes.default: _split}), dtypes


def _split(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def check_installed(toolchain: Toolchain) -> None:
    """Does the toolchain's interpreter have its packages?

    Raises:
        MissingExtraError: no, or there is no such interpreter.
    """
    find = f"import importlib.util as u, sys; sys.exit(not all(u.find_spec(p) for p in {toolchain.packages!r}))"
    try:
        done = subprocess.run([toolchain.python, "-c", find], capture_output=True, timeout=60, env=_environment())
        missing = done.returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        missing = True
    if missing:
        raise MissingExtraError(
            f"{toolchain.python} does not have {' and '.join(toolchain.packages)}; install them with: "
            f"pip install 'lockstep-rl[{toolchain.kind}]', or, where their pinned versions are in the way, into an "
            f"environment of their own (torch {torch.__version__.split('+')[0]} first), and name its interpreter in "
            f"LOCKSTEP_{toolchain.kind.upper()}_PYTHON"
        )


def _convert(toolchain: Toolchain, source: Path, out: Path, deadline_s: float = 600.0) -> None:
    command = [str(part) for part in (toolchain.python, WORKER, "convert", toolchain.kind, source, out.resolve())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, env=_environment())
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(
            f"the {toolchain.kind} converter took over {deadline_s:.0f} s; export a smaller network"
        ) from error
    if done.returncode:
        raise ExportError(f"the {toolchain.kind} converter refused the policy: {reason_of(done.stderr)}")


class EdgeProcess:
    """A file at work in its runtime's process. Calls are inputs by name -> outputs by name, N rows each, one by one.

    Raises:
        CheckpointError: the runtime cannot read the file.
        MissingExtraError: there is no such runtime.
    """

    def __init__(self, toolchain: Toolchain, path: Path, deadline_s: float = 120.0) -> None:
        check_installed(toolchain)
        self.path = path
        command = [toolchain.python, WORKER, "serve", toolchain.kind, path.resolve()]
        self._child = Child(command, toolchain.kind, _environment(), deadline_s)
        self.text = self._receive()["metadata"].tobytes().decode()
        document = json.loads(self.text)
        self.inputs = [port["name"] for port in document["inputs"]]
        self.outputs = dict(zip(document["outputs"], document["output_dtypes"], strict=True))

    def __call__(self, inputs: Arrays) -> Arrays:
        return self._ask(inputs, 0)[0]

    def seconds(self, inputs: Arrays, repeat: int) -> float:
        """Of the fastest of `repeat` calls with the first row, measured inside of the process."""
        return self._ask({name: x[:1] for name, x in inputs.items()}, repeat)[1]

    def _ask(self, inputs: Arrays, repeat: int) -> tuple[Arrays, float]:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {str(place): inputs[name] for place, name in enumerate(self.inputs)}
        np.savez(buffer, repeat=np.int64(repeat), **arrays)
        self._child.send(len(buffer.getvalue()).to_bytes(8, "little") + buffer.getvalue())
        reply = self._receive()
        found = {n: reply[str(i)].astype(dtype, copy=False) for i, (n, dtype) in enumerate(self.outputs.items())}
        return found, float(reply["seconds"])

    def _receive(self) -> Arrays:
        header = self._child.read(8) or b""
        body = self._child.read(int.from_bytes(header, "little")) if len(header) == 8 else b""
        if not body:
            raise CheckpointError(f"{self.path} cannot be read or run by {self._child.name}: {self._child.reason()}")
        with np.load(io.BytesIO(body)) as reply:
            return dict(reply)


def _environment() -> dict[str, str]:
    """Of the interpreter: without paths that belong to ours, and quiet."""
    environment = child_environment(TF_CPP_MIN_LOG_LEVEL="3", PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1")
    environment.pop("PYTHONPATH", None)
    return environment
