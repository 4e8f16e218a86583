"""An exported policy, read back: the same call for every kind of file.

Legend: N rows.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import CheckpointError, ConfigError, InputError
from lockstep.core.extras import require
from lockstep.interop.program import FORMAT, METADATA_KEY, NEXT_STATE, OBSERVATION, STARTS, STATE, Port

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class ExportedPolicy:
    """A policy that runs from its file alone.

    `metadata` holds the policy's version, digest and spec.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    metadata: dict[str, Any]
    run: Callable[[Arrays], Arrays]

    def __call__(self, inputs: Arrays) -> Arrays:
        """Inputs by name, N rows each -> outputs by name.

        Raises:
            InputError: a missing or unknown name, or a shape that does not fit.
        """
        names = [port.name for port in self.inputs]
        for name in {**inputs, **dict.fromkeys(names)}:
            if name not in inputs or name not in names:
                raise InputError(f"inputs are {sorted(names)}; got {sorted(inputs)}", field=name)
        num = len(inputs[names[0]])
        for port in self.inputs:
            if inputs[port.name].shape != (num, *port.shape):
                got = inputs[port.name].shape
                raise InputError(f"{port.name} is {got}; expected {(num, *port.shape)}", field=port.name)
        return self.run({p.name: np.ascontiguousarray(inputs[p.name], dtype=p.dtype) for p in self.inputs})

    def initial_state(self, num: int) -> Arrays:
        """`state.NAME` inputs of N rows before their first observation; empty for a policy without state."""
        return {port.name: port.zeros(num) for port in self.inputs if port.name.startswith(STATE)}

    def next_state(self, outputs: Arrays) -> Arrays:
        """The `state.NAME` inputs that follow a call's outputs."""
        names = [port.name.removeprefix(STATE) for port in self.inputs if port.name.startswith(STATE)]
        return {STATE + name: outputs[NEXT_STATE + name] for name in names}


class ExportedActor:
    """An exported policy at work on N rows, its state carried along (`lockstep.rl.evaluate.Decider`)."""

    def __init__(self, exported: ExportedPolicy, num_rows: int) -> None:
        self.exported = exported
        self.state = exported.initial_state(num_rows)
        self.starts = np.ones(num_rows, np.bool_)

    def decide(self, obs: Any) -> np.ndarray:
        """Observations, N rows -> the environments' actions."""
        inputs = {**obs} if isinstance(obs, dict) else {OBSERVATION: obs}
        outputs = self.exported({**inputs, **self.state, STARTS: self.starts} if self.state else inputs)
        self.state = self.exported.next_state(outputs)
        return outputs["action"]

    def advance(self, starts_N: np.ndarray, valid_N: np.ndarray) -> None:
        """Which rows begin an episode with their next observation."""
        self.starts = np.asarray(starts_N, dtype=np.bool_)


def load_exported(path: Path | str) -> ExportedPolicy:
    """Read a file that one of the exporters wrote.

    Raises:
        CheckpointError: missing, damaged, or not written by Lockstep.
        ConfigError: a name that ends in none of the suffixes we write.
        MissingExtraError: the file's runtime is not installed.
    """
    path = Path(path)
    readers = {
        ".onnx": _open_onnx,
        ".ort": _open_onnx,
        ".pt2": _open_torch,
        ".xml": _open_openvino,
        ".tflite": _open_edge,
        ".pte": _open_edge,
    }
    if path.is_dir() and path.suffix not in readers:
        readers[path.suffix] = _open_browser
    if path.suffix not in readers:
        raise ConfigError(f"{path} ends in {path.suffix!r}; expected {' or '.join(readers)}")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; write it with: lockstep export RUN --out {path}")
    text, run = readers[path.suffix](path)
    try:
        metadata = json.loads(text)
        if metadata["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {metadata['format']!r}; expected {FORMAT!r}")
        inputs = tuple(Port(port["name"], port["dtype"], tuple(port["shape"])) for port in metadata["inputs"])
        return ExportedPolicy(inputs, tuple(metadata["outputs"]), metadata, run)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} was not written by lockstep export: {error!r}") from error


def _open_onnx(path: Path) -> tuple[str, Callable[[Arrays], Arrays]]:
    session = onnx_session(path)
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, inputs), strict=True))

    return session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, ""), run


def onnx_session(path: Path) -> Any:
    """An ONNX Runtime session on one thread.

    Raises:
        CheckpointError: the file cannot be read.
    """
    runtime = require("onnxruntime", extra="onnx")
    try:
        return runtime.InferenceSession(str(path), onnx_options(), providers=["CPUExecutionProvider"])
    except Exception as error:
        # The runtime's errors have no public base class.
        raise CheckpointError(f"{path} cannot be read by ONNX Runtime: {error}") from error


def onnx_options() -> Any:
    """Options of a quiet session on one thread."""
    options = require("onnxruntime", extra="onnx").SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _open_openvino(path: Path) -> tuple[str, Callable[[Arrays], Arrays]]:
    openvino = require("openvino", extra="openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    try:
        core = openvino.Core()
        model = core.read_model(str(path))
        text = model.get_rt_info(METADATA_KEY).astype(str) if model.has_rt_info(METADATA_KEY) else ""
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be read by OpenVINO: {error}") from error
    names = [output.any_name for output in compiled.outputs]

    def run(inputs: Arrays) -> Arrays:
        results = compiled(inputs)
        return {name: np.array(results[name]) for name in names}

    return text, run


def _open_edge(path: Path) -> tuple[str, Callable[[Arrays], Arrays]]:
    # Imported here: that module writes such files too, and reads them back with `load_exported`.
    from lockstep.interop.export.edge import EXECUTORCH, LITERT, EdgeProcess

    process = EdgeProcess(LITERT if path.suffix == LITERT.suffix else EXECUTORCH, path)
    return process.text, process


def _open_browser(path: Path) -> tuple[str, Callable[[Arrays], Arrays]]:
    from lockstep.interop.export.browser import BrowserProcess

    process = BrowserProcess(path)
    return process.text, process


def _open_torch(path: Path) -> tuple[str, Callable[[Arrays], Arrays]]:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} cannot be read: it is no torch.export archive, or it is cut off")
    extra = {METADATA_KEY: ""}
    try:
        module = torch.export.load(str(path), extra_files=extra).module()
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{path} cannot be read by torch.export.load: {error}") from error
    return extra[METADATA_KEY], torch_runner(module)


def torch_runner(module: Callable[..., dict[str, torch.Tensor]]) -> Callable[[Arrays], Arrays]:
    """NumPy in, NumPy out, around a loaded program."""

    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            outputs = module({name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: x.numpy() for name, x in outputs.items()}

    return run
