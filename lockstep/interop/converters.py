"""Frameworks' own converters to ONNX, each in a process of an interpreter that has the framework.

TensorFlow and Paddle crash when they share a process, and neither can be installed beside everything else; so the interpreter
is one of its own virtual environment, named by `python=`, by LOCKSTEP_TENSORFLOW_PYTHON or LOCKSTEP_PADDLE_PYTHON, and ours
only where it has the converter.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lockstep.core.env import child_environment, converter_python
from lockstep.core.errors import FormatError, MissingExtraError
from lockstep.interop.export.child import reason_of
from lockstep.interop.onnx.reader import ORIGINAL_NAME, read_onnx
from lockstep.models.graph.module import GraphModule

SECONDS = 600.0
"""Longest time a conversion may take."""
OPSET = 17
TENSORFLOW = Path(__file__).parent / "tensorflow" / "convert.py"


def tensorflow_to_onnx(
    path: Path, arguments: Sequence[str], *, files: Sequence[Path] = (), python: str = ""
) -> GraphModule:
    """What `python -m tf2onnx.convert ARGUMENTS` makes of a file; `files`: what it reads, where that is more than the file.

    Raises:
        FormatError: the converter refuses it, which the message quotes, ends by a signal, or needs more than 10 minutes.
        MissingExtraError: no interpreter has tf2onnx.
    """
    size = sum(file.stat().st_size for file in files or [path] if file.is_file())
    command = [interpreter("tensorflow", "tf2onnx", python), str(TENSORFLOW), str(size), *arguments]
    return _converted(path, [*command, "--opset", str(OPSET), "--output"], "tensorflow")


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
        status, words = run_converter([*command, str(out)], path, framework)
        if status < 0:
            raise FormatError(
                f"the converter of {framework} crashes on it ({_signal(-status)}): {reason_of(words)}", path=str(path)
            )
        if status != 0 or not out.exists():
            raise FormatError(f"the converter of {framework} refuses it: {reason_of(words)}", path=str(path))
        try:
            module = read_onnx(out)
        except FormatError as error:
            raise FormatError(f"after conversion: {error.reason}", path=str(path), op=error.op) from error
    module.original.pop(ORIGINAL_NAME, None)
    about = replace(module.graph.about, format=framework, producer=module.graph.about.producer.removesuffix(" None"))
    module.graph = replace(module.graph, about=about)
    return module


def run_converter(command: Sequence[str], path: Path, framework: str) -> tuple[int, str]:
    """(exit status, what it said) of a converter's process, which works in the folder of its last argument.

    Raises:
        FormatError: it cannot be started, or does not end in time.
    """
    # The interpreter's own packages alone: ours are of another set of versions.
    clean = child_environment(PYTHONPATH="", CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="3")
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env=clean,
            cwd=Path(command[-1]).parent,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FormatError(f"the converter of {framework} took more than {SECONDS:.0f} s", path=str(path)) from error
    except OSError as error:
        raise FormatError(f"the converter of {framework} cannot be started: {error}", path=str(path)) from error
    return done.returncode, done.stderr if done.stderr.strip() else done.stdout


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
