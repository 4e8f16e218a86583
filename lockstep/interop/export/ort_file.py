"""A policy in ONNX Runtime's own format, which its builds for phones and browsers read without the ONNX parser."""

from __future__ import annotations

from pathlib import Path

from lockstep.core.extras import require
from lockstep.interop.check import Deviation, compare, tolerance_of
from lockstep.interop.exported import load_exported, onnx_options
from lockstep.interop.files import replaced_when_checked
from lockstep.interop.onnx_file import write_onnx
from lockstep.interop.program import one_thread
from lockstep.models.control.policy import Policy


def export_ort(policy: Policy, path: Path | str, *, distribution: bool = False) -> list[Deviation]:
    """Write the whole pipeline of `policy` to an `.ort` file; inputs, outputs and metadata as in `export_onnx`.

    Only rewrites that hold on every processor are applied (ONNX Runtime's "basic" level).

    Raises:
        ExportError: the file did something else than the policy; it is deleted.
        ConfigError: the path cannot be written.
        MissingExtraError: onnx, onnxscript or onnxruntime are not installed.
    """
    runtime = require("onnxruntime", extra="onnx")
    with one_thread(), replaced_when_checked(Path(path), ".ort") as temporary:
        source = temporary.with_suffix(".onnx")
        try:
            write_onnx(policy, source, distribution=distribution)
            options = onnx_options()
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.optimized_model_filepath = str(temporary)
            options.add_session_config_entry("session.save_model_format", "ORT")
            runtime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        finally:
            source.unlink(missing_ok=True)
        return compare(policy, load_exported(temporary), tolerance=tolerance_of(policy))
