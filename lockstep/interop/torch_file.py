"""A policy as a `torch.export` program, checked before it is kept."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from lockstep.interop.check import Deviation, compare, tolerance_of
from lockstep.interop.exported import load_exported
from lockstep.interop.files import replaced_when_checked
from lockstep.interop.program import METADATA_KEY, PolicyProgram, one_thread
from lockstep.models.control.policy import Policy


def export_torch(
    policy: Policy, path: Path | str, *, portable: bool = False, distribution: bool = False
) -> list[Deviation]:
    """Write the whole pipeline of `policy` to a `.pt2` file; see `PolicyProgram` for its inputs and outputs.

    Args:
        portable: use only operators of PyTorch: `torch.export.load(path).module()(inputs)` then runs without Lockstep
            and agrees within float32 rounding. Otherwise the program holds our operators, needs `import
            lockstep.kernels` before it is loaded, and gives the policy's bits.
        distribution: also yield the parameters of the action distribution.

    Returns:
        Largest deviations from the policy on random observations.

    Raises:
        ExportError: the file did something else than the policy; it is deleted.
        ConfigError: the path cannot be written.
    """
    program = PolicyProgram(policy, exactness="portable" if portable else "exact", distribution=distribution)
    with one_thread(), replaced_when_checked(Path(path), ".pt2") as temporary:
        with warnings.catch_warnings():
            # Internals of torch.export call functions that torch itself has deprecated.
            warnings.simplefilter("ignore")
            traced = program.trace()
            torch.export.save(traced, str(temporary), extra_files={METADATA_KEY: program.metadata(policy, "torch")})
            exported = load_exported(temporary)
        return compare(policy, exported, tolerance=tolerance_of(policy) if portable else 0.0)
