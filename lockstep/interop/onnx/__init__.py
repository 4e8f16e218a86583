"""ONNX files as trainable modules, and back: the original graph with tuned weights."""

from lockstep.interop.onnx.reader import read_onnx
from lockstep.interop.onnx.writer import save_onnx

__all__ = ["read_onnx", "save_onnx"]
