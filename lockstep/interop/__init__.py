"""Models of other frameworks as modules of ours, and policies in other runtimes' files, checked against the original
before they are handed out."""

from lockstep.interop.exported import ExportedPolicy, load_exported
from lockstep.interop.onnx_file import export_onnx
from lockstep.interop.readers import load
from lockstep.interop.torch_file import export_torch

__all__ = ["ExportedPolicy", "export_onnx", "export_torch", "load", "load_exported"]
