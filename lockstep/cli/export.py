"""`lockstep export`: a policy as a file for another runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lockstep.api import load
from lockstep.core.errors import ConfigError, unknown_name

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


@dataclass(frozen=True)
class ExportArgs:
    """Write a policy, its whole pipeline included, to a file for another runtime, and check that file against it."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory or policy folder."""
    to: str = "onnx"
    """onnx, or torch for a torch.export program (.pt2)."""
    out: Path | None = None
    """File to write (default: policy.onnx or policy.pt2 in the source)."""
    portable: bool = False
    """With --to torch: only operators of PyTorch, which needs no Lockstep to load and is equal within rounding.
    ONNX files always are."""
    distribution: bool = False
    """Also yield the parameters of the action distribution, to sample from it elsewhere."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ExportArgs, args=list(args), prog="lockstep export")
    if wish.to not in SUFFIXES:
        raise ConfigError(unknown_name("export format", wish.to, SUFFIXES))
    if wish.portable and wish.to == "onnx":
        raise ConfigError("--portable belongs to --to torch; ONNX files are always portable")
    policy = load(wish.source)
    out = wish.out or wish.source / f"policy{SUFFIXES[wish.to]}"
    # Imported here so that --help and a mistyped flag do not wait for the exporters.
    from lockstep.interop import export_onnx, export_torch, load_exported

    if wish.to == "onnx":
        deviations = export_onnx(policy, out, distribution=wish.distribution)
        against = "in ONNX Runtime"
    else:
        deviations = export_torch(policy, out, portable=wish.portable, distribution=wish.distribution)
        against = "loaded by torch.export.load"
    exported = load_exported(out)
    print(f"wrote {out}: version {policy.version}, digest {policy.digest()[:12]}")
    print(f"inputs   {', '.join(f'{p.name} {p.dtype} {[-1, *p.shape]}' for p in exported.inputs)}")
    print(f"outputs  {', '.join(exported.outputs)}")
    print(f"compared with the policy, {against}, on random observations:")
    for deviation in deviations:
        print(f"  {deviation}")
    return 0
