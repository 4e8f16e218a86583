"""A policy as an ONNX model with 8-bit products, by ONNX Runtime's quantiser.

Legend: N rows.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from lockstep.core.errors import ExportError
from lockstep.core.extras import require
from lockstep.interop.exported import Arrays, load_exported
from lockstep.interop.files import replaced_when_checked
from lockstep.interop.onnx_file import write_onnx
from lockstep.interop.program import METADATA_KEY, PolicyProgram, one_thread
from lockstep.models.control.policy import Policy

PRODUCTS = ["MatMul", "Gemm", "Conv"]
INT8_NODES = {"MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QuantizeLinear", "QLinearConv", "QLinearMatMul"}


def export_int8(policy: Policy, path: Path | str, *, calibration: Arrays | None = None) -> None:
    """Write the whole pipeline of `policy` to an ONNX file whose matrix products and convolutions are of 8-bit integers;
    everything else, the distribution included, stays float32.

    The file does not do exactly what the policy does, so it is not compared; measure it. It runs, or is not there.

    Args:
        policy: any.
        path: ends in `.onnx`.
        calibration: inputs by name, N rows, that fix the ranges of activations (static); without, each call finds its own
            ranges (dynamic). Weights keep 7 bits when static, so that no processor's sums saturate.

    Raises:
        ExportError: the policy has no product to quantise, or the file cannot be run; it is deleted.
        ConfigError: the path cannot be written.
        MissingExtraError: onnx, onnxscript or onnxruntime are not installed.
    """
    onnx = require("onnx", extra="onnx")
    quantisation: Any = require("onnxruntime.quantization", extra="onnx")
    logger, level = logging.getLogger(), logging.getLogger().level
    with one_thread(), replaced_when_checked(Path(path), ".onnx") as temporary, tempfile.TemporaryDirectory() as place:
        source = Path(place) / "policy.onnx"
        write_onnx(policy, source, distribution=True)
        logger.setLevel(logging.ERROR)  # the quantiser advises on the root logger
        try:
            if calibration is None:
                quantisation.quantize_dynamic(source, temporary, op_types_to_quantize=PRODUCTS)
            else:
                quantisation.quantize_static(
                    source,
                    temporary,
                    _reader(quantisation, calibration),
                    quant_format=quantisation.QuantFormat.QDQ,
                    op_types_to_quantize=PRODUCTS,
                    per_channel=True,
                    reduce_range=True,
                )
        finally:
            logger.setLevel(level)
        model = onnx.load(str(temporary))
        if not INT8_NODES & {node.op_type for node in model.graph.node}:
            raise ExportError("the policy has no matrix product or convolution with constant weights to quantise")
        program = PolicyProgram(policy, exactness="portable", distribution=True)
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {METADATA_KEY: program.metadata(policy, "onnx-int8")})
        onnx.save(model, str(temporary))
        load_exported(temporary)({port.name: port.zeros(2) for port in program.inputs})


def _reader(quantisation: Any, inputs: Arrays) -> Any:
    """ONNX Runtime's form of calibration data: batches of 64 rows until None."""

    class Reader(quantisation.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            num = len(next(iter(inputs.values())))
            starts = range(0, num, 64)
            self.batches = iter([{name: x[start : start + 64] for name, x in inputs.items()} for start in starts])

        def get_next(self) -> Arrays | None:
            return next(self.batches, None)

    return Reader()
