"""GGUF files: a reader that survives hostile ones, block formats, names and configs of the families, and a writer."""

from lockstep.interop.gguf.blocks import QUANTISERS, READABLE, dequantise, quantise
from lockstep.interop.gguf.container import Field, GGUFFile, TensorInfo
from lockstep.interop.gguf.export import save_gguf
from lockstep.interop.gguf.formats import ValueType
from lockstep.interop.gguf.source import GGUFBlocks, GGUFSource
from lockstep.interop.gguf.unpack import LAYOUTS, unpack
from lockstep.interop.gguf.writer import TensorData, write_gguf

__all__ = [
    "LAYOUTS",
    "QUANTISERS",
    "READABLE",
    "Field",
    "GGUFBlocks",
    "GGUFFile",
    "GGUFSource",
    "TensorData",
    "TensorInfo",
    "ValueType",
    "dequantise",
    "quantise",
    "save_gguf",
    "unpack",
    "write_gguf",
]
