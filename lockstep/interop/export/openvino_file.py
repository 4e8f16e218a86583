"""A policy in OpenVINO's format: `NAME.xml`, the graph, and `NAME.bin` beside it, the weights."""

from __future__ import annotations

from pathlib import Path

from lockstep.core.extras import require
from lockstep.interop.check import Deviation, compare, tolerance_of
from lockstep.interop.exported import load_exported
from lockstep.interop.files import replaced_when_checked
from lockstep.interop.onnx_file import write_onnx
from lockstep.interop.program import METADATA_KEY, PolicyProgram, one_thread
from lockstep.models.control.policy import Policy


def export_openvino(policy: Policy, path: Path | str, *, distribution: bool = False) -> list[Deviation]:
    """Write the whole pipeline of `policy` to `path` (`.xml`) and its weights to the `.bin` beside it.

    Weights stay float32. The entry `lockstep` of the model's runtime information is the metadata of `export_onnx`.
    OpenVINO itself computes in bfloat16 where a processor has it, unless asked for `INFERENCE_PRECISION_HINT=f32`; the
    comparison asks.

    Raises:
        ExportError: the file did something else than the policy; it is deleted.
        ConfigError: the path cannot be written.
        MissingExtraError: openvino, onnx or onnxscript are not installed.
    """
    openvino = require("openvino", extra="openvino")
    with one_thread(), replaced_when_checked(Path(path), ".xml", companion=".bin") as temporary:
        source = temporary.with_suffix(".onnx")
        try:
            write_onnx(policy, source, distribution=distribution)
            model = openvino.convert_model(str(source))
        finally:
            source.unlink(missing_ok=True)
        program = PolicyProgram(policy, exactness="portable", distribution=distribution)
        model.set_rt_info(program.metadata(policy, "openvino"), METADATA_KEY)
        openvino.save_model(model, str(temporary), compress_to_fp16=False)
        return compare(policy, load_exported(temporary), tolerance=tolerance_of(policy))
