"""Frameworks' own converters to ONNX, each in a process of an interpreter that has the framework.

TensorFlow and Paddle crash when they share a process, and neither can be installed beside everything else; so the interpreter
is one of its own virtual environment, named by `python=`, by LOCKSTEP_TENSORFLOW_PYTHON or LOCKSTEP_PADDLE_PYTHON, and ours
only where it has the converter.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lockstep.core.env import child_environment, converter_python
from lockstep.core.errors import FormatError, MissingExtraError
from lockstep.interop.onnx.reader import ORIGINAL_NAME, read_onnx
from lockstep.models.graph.module import GraphModule

SECONDS = 600.0
"""Longest time a conversion may take."""
OPSET = 17


def tensorflow_to_onnx(path: Path, arguments: Sequence[str], *, python: str = "") -> GraphModule:
    """What `python -m tf2onnx.convert ARGUMENTS` makes of a file.

    Raises:
        FormatError: the converter refuses it, which the message quotes, or needs more than 10 minutes.
        MissingExtraError: no interpreter has tf2onnx.
    """
    command = [interpreter("tensorflow", "tf2onnx", python), "-m", "tf2onnx.convert", *arguments, "--opset", str(OPSET)]
    return _converted(path, [*command, "--output"], "tensorflow")


def paddle_to_onnx(program: Path, weights: Path, *, python: str = "") -> GraphModule:
    """What paddle2onnx makes of an inference program.

    Raises:
        FormatError, MissingExtraError: as `tensorflow_to_onnx`.
    """
    code = "import sys, paddle2onnx; paddle2onnx.export(sys.argv[1], sys.argv[2], sys.argv[3])"
    command = [interpreter("paddle", "paddle2onnx", python), "-c", code, str(program.resolve()), str(weights.resolve())]
    return _converted(program, command, "paddle")


def interpreter(framework: str, module: str, given: str) -> str:
    """The interpreter to run.

    Raises:
        MissingExtraError: none is named, and ours lacks the converter.
    """
    named = Path(given) if given else converter_python(framework)
    if named != Path(sys.executable):
        if not named.exists():
            raise MissingExtraError(f"the interpreter {named} for {framework} does not exist")
        return str(named)
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    raise MissingExtraError(
        f"{module} is needed for this file, in a virtual environment of its own: python -m venv tf && tf/bin/pip install "
        f"{module} {framework}; then name its interpreter with python= or LOCKSTEP_{framework.upper()}_PYTHON"
    )


def _converted(path: Path, command: Sequence[str], framework: str) -> GraphModule:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.onnx"
        # The interpreter's own packages alone: ours are of another set of versions.
        clean = child_environment(PYTHONPATH="", CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="3")
        try:
            done = subprocess.run(
                [*command, str(out)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                env=clean,
                cwd=folder,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise FormatError(f"the converter of {framework} took more than {SECONDS:.0f} s", path=str(path)) from error
        except OSError as error:
            raise FormatError(f"the converter of {framework} cannot be started: {error}", path=str(path)) from error
        if done.returncode != 0 or not out.exists():
            lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
            raise FormatError(
                f"the converter of {framework} refuses it: {' | '.join(lines[-2:])[:400]}", path=str(path)
            )
        try:
            module = read_onnx(out)
        except FormatError as error:
            raise FormatError(f"after conversion: {error.reason}", path=str(path), op=error.op) from error
    module.original.pop(ORIGINAL_NAME, None)
    module.graph = replace(module.graph, about=replace(module.graph.about, format=framework))
    return module
