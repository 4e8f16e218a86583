"""A policy as an ONNX model, checked in ONNX Runtime before it is kept."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from lockstep.core.extras import require
from lockstep.interop.check import Deviation, compare, tolerance_of
from lockstep.interop.exported import load_exported
from lockstep.interop.files import replaced_when_checked
from lockstep.interop.program import METADATA_KEY, PolicyProgram, one_thread
from lockstep.models.control.policy import Policy


def export_onnx(policy: Policy, path: Path | str, *, distribution: bool = False) -> list[Deviation]:
    """Write the whole pipeline of `policy` to an ONNX file; see `PolicyProgram` for its inputs and outputs.

    The file's metadata entry `lockstep` is JSON with version, digest and spec.

    Args:
        distribution: also yield the parameters of the action distribution.

    Returns:
        Largest deviations from the policy, measured in ONNX Runtime on random observations.

    Raises:
        ExportError: the file did something else than the policy; it is deleted.
        ConfigError: the path cannot be written.
        MissingExtraError: onnx, onnxscript or onnxruntime are not installed.
    """
    require("onnxruntime", extra="onnx")
    with one_thread(), replaced_when_checked(Path(path), ".onnx") as temporary:
        write_onnx(policy, temporary, distribution=distribution)
        exported = load_exported(temporary)
        return compare(policy, exported, tolerance=tolerance_of(policy))


def write_onnx(policy: Policy, path: Path, *, distribution: bool) -> None:
    """Write the file without comparing it: what other formats are made from.

    Raises:
        MissingExtraError: onnx or onnxscript are not installed.
    """
    for module in ("onnx", "onnxscript"):
        require(module, extra="onnx")
    program = PolicyProgram(policy, exactness="portable", distribution=distribution)
    _write(program, program.metadata(policy, "onnx"), path)


def _write(program: PolicyProgram, metadata: str, path: Path) -> None:
    # The exporter warns of its own deprecated calls and of an absent torchvision, neither of which concerns the user.
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            result = torch.onnx.export(
                program.trace(),
                input_names=[port.name for port in program.inputs],
                output_names=program.output_names,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert result is not None
    result.model.metadata_props[METADATA_KEY] = metadata
    result.save(str(path), external_data=False)
