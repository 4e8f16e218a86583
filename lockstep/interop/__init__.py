"""Models of other frameworks as modules of ours, and policies in other runtimes' files, checked against the original
before they are handed out.

Names are imported when they are first used: a server of language models opens files by this package and needs none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.interop.export.browser import export_browser
    from lockstep.interop.export.edge import export_executorch, export_litert
    from lockstep.interop.export.openvino_file import export_openvino
    from lockstep.interop.export.ort_file import export_ort
    from lockstep.interop.exported import ExportedPolicy, load_exported
    from lockstep.interop.onnx_file import export_onnx
    from lockstep.interop.readers import load
    from lockstep.interop.torch_file import export_torch

_HOMES = {
    "ExportedPolicy": "exported",
    "export_browser": "export.browser",
    "export_executorch": "export.edge",
    "export_litert": "export.edge",
    "export_onnx": "onnx_file",
    "export_openvino": "export.openvino_file",
    "export_ort": "export.ort_file",
    "export_torch": "torch_file",
    "load": "readers",
    "load_exported": "exported",
}

__all__ = [
    "ExportedPolicy",
    "export_browser",
    "export_executorch",
    "export_litert",
    "export_onnx",
    "export_openvino",
    "export_ort",
    "export_torch",
    "load",
    "load_exported",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return importlib.import_module(f"lockstep.interop.{_HOMES[name]}").__dict__[name]
    raise AttributeError(f"module 'lockstep.interop' has no attribute {name!r}")
