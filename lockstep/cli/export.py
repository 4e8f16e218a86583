"""`lockstep export`: a policy as a file for another runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lockstep.api import env_of, load
from lockstep.cli.model_words import names_language_model
from lockstep.core.errors import ConfigError, unknown_name
from lockstep.models.control.policy import Policy

if TYPE_CHECKING:
    from lockstep.interop.check import Deviation

TARGETS = {
    "onnx": (".onnx", "in ONNX Runtime"),
    "ort": (".ort", "in ONNX Runtime"),
    "torch": (".pt2", "loaded by torch.export.load"),
    "openvino": (".xml", "in OpenVINO"),
    "tflite": (".tflite", "in LiteRT, row by row"),
    "pte": (".pte", "in ExecuTorch, row by row"),
    "browser": ("", "in the page's onnxruntime-web, under Node"),
}
"""Suffix of the file, and where it is compared with the policy."""


@dataclass(frozen=True)
class ExportArgs:
    """Write a policy, its whole pipeline included, to a file for another runtime, and check that file against it."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory or policy folder."""
    to: str = "onnx"
    """onnx; ort (ONNX Runtime's own format); torch for a torch.export program (.pt2); openvino (.xml and .bin); tflite for
    LiteRT and pte for ExecuTorch, both for one row at a time; browser for a folder with a page."""
    out: Path | None = None
    """File to write (default: policy.onnx, policy.pt2, ... in the source)."""
    portable: bool = False
    """With --to torch: only operators of PyTorch, which needs no Lockstep to load and is equal within rounding.
    The other files always are."""
    distribution: bool = False
    """Also yield the parameters of the action distribution, to sample from it elsewhere."""
    runtime: Path | None = None
    """With --to browser: a file of `npm pack onnxruntime-web`, instead of asking npm for it."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ExportArgs, args=list(args), prog="lockstep export")
    if wish.to not in TARGETS:
        raise ConfigError(unknown_name("export format", wish.to, TARGETS))
    if wish.portable and wish.to != "torch":
        raise ConfigError("--portable belongs to --to torch; the other files are always portable")
    if wish.runtime is not None and wish.to != "browser":
        raise ConfigError("--runtime belongs to --to browser")
    if names_language_model(str(wish.source)):
        raise ConfigError(f"{wish.source} is a language model; write it by: lockstep convert {wish.source} OUT.gguf")
    policy = load(wish.source)
    suffix, against = TARGETS[wish.to]
    out = wish.out or wish.source / (f"policy{suffix}" if suffix else "browser")
    deviations = export(
        wish.to,
        policy,
        out,
        portable=wish.portable,
        distribution=wish.distribution,
        environment=_environment(wish.source),
        runtime=wish.runtime,
    )
    from lockstep.interop import load_exported

    exported = load_exported(out)
    print(f"wrote {out}: version {policy.version}, digest {policy.digest()[:12]}")
    print(f"inputs   {', '.join(f'{p.name} {p.dtype} {[-1, *p.shape]}' for p in exported.inputs)}")
    print(f"outputs  {', '.join(exported.outputs)}")
    print(f"compared with the policy, {against}, on random observations:")
    for deviation in deviations:
        print(f"  {deviation}")
    if wish.to == "browser":
        print(f"open it with: python -m http.server --directory {out}")
    return 0


def export(
    to: str,
    policy: Policy,
    out: Path,
    *,
    portable: bool = True,
    distribution: bool = False,
    environment: str = "",
    runtime: Path | None = None,
) -> list[Deviation]:
    """Write one target; see the exporters of `lockstep.interop` for arguments and errors."""
    # Imported here so that --help and a mistyped flag do not wait for the exporters.
    from lockstep import interop

    if to == "torch":
        return interop.export_torch(policy, out, portable=portable, distribution=distribution)
    if to == "browser":
        return interop.export_browser(policy, out, distribution=distribution, environment=environment, runtime=runtime)
    exporters = {
        "onnx": interop.export_onnx,
        "ort": interop.export_ort,
        "openvino": interop.export_openvino,
        "tflite": interop.export_litert,
        "pte": interop.export_executorch,
    }
    return exporters[to](policy, out, distribution=distribution)


def _environment(source: Path) -> str:
    """Id of the environment that the policy was trained on, empty where it does not say."""
    try:
        return str(env_of(source, "").id)
    except ConfigError:
        return ""
