"""Models of other frameworks as modules of ours, and policies in other runtimes' files, checked against the original
before they are handed out."""

from lockstep.interop.export.browser import export_browser
from lockstep.interop.export.edge import export_executorch, export_litert
from lockstep.interop.export.openvino_file import export_openvino
from lockstep.interop.export.ort_file import export_ort
from lockstep.interop.exported import ExportedPolicy, load_exported
from lockstep.interop.onnx_file import export_onnx
from lockstep.interop.readers import load
from lockstep.interop.torch_file import export_torch

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
