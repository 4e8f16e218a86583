"""Which reader opens a file: by its content where the format says who it is, by its suffix where not."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lockstep.core.errors import ConfigError, FormatError, unknown_name
from lockstep.interop.pytorch.sb3 import is_sb3
from lockstep.interop.tensorflow.sb2 import is_sb2
from lockstep.models.graph.folder import is_graph_folder
from lockstep.models.graph.module import GraphModule

Read = Callable[..., GraphModule]


@dataclass(frozen=True)
class Reader:
    """One format.

    `function` is "module:name", imported when it is needed: it takes the path and the options of `load`, and returns a
    `GraphModule` or raises FormatError, which names the operation, the file and the offset. `recognise` looks at the path and
    the file's first 4 KiB (empty for a folder); several formats share a suffix.

    >>> READERS["onnx"].suffixes
    ('.onnx',)
    """

    suffixes: tuple[str, ...]
    function: str
    summary: str
    recognise: Callable[[Path, bytes], bool] = lambda path, head: True

    def read(self) -> Read:
        """The reading function."""
        module, _, name = self.function.partition(":")
        return importlib.import_module(module).__dict__[name]  # type: ignore[no-any-return]


def _is_folder(path: Path, head: bytes) -> bool:
    return path.is_dir() and is_graph_folder(path)


READERS: dict[str, Reader] = {
    "lockstep": Reader(
        ("",), "lockstep.models.graph.folder:load_graph", "folder that `lockstep import` wrote", _is_folder
    ),
    "onnx": Reader((".onnx",), "lockstep.interop.onnx.reader:read_onnx", "ONNX model, with its external data"),
    "caffe": Reader(
        (".prototxt", ".caffemodel", ".h5"),
        "lockstep.interop.caffe.lowering:read_caffe",
        "Caffe network: .prototxt and .caffemodel of one name",
        lambda path, head: path.suffix != ".h5" or path.name.endswith(".caffemodel.h5"),
    ),
    "mxnet": Reader(
        (".json", ".params"),
        "lockstep.interop.mxnet.lowering:read_mxnet",
        "MXNet network: NAME-symbol.json and NAME-0000.params",
        lambda path, head: head.startswith(b"\x12\x01\0\0\0\0\0\0") if path.suffix == ".params" else b'"nodes"' in head,
    ),
    "torch": Reader(
        (".safetensors", ".pt", ".pth", ".bin", ".ckpt"),
        "lockstep.interop.pytorch.reader:read_state_dict",
        "weights of PyTorch: state dict or safetensors",
        lambda path, head: path.suffix == ".safetensors" or head.startswith(b"PK"),
    ),
    "torch.export": Reader((".pt2",), "lockstep.interop.pytorch.program:read_pt2", "program of torch.export"),
    "sb3": Reader(
        (".zip",),
        "lockstep.interop.pytorch.sb3:read_sb3",
        "Stable-Baselines3 model: PPO, A2C, DQN, SAC, TD3, DDPG",
        lambda path, head: is_sb3(path),
    ),
    "sb2": Reader(
        (".zip", ".pkl"),
        "lockstep.interop.tensorflow.sb2:read_sb2",
        "Stable-Baselines 2 model: A2C, ACER, ACKTR, PPO1, PPO2, TRPO, DQN, SAC, TD3, DDPG",
        lambda path, head: is_sb2(path),
    ),
    "cleanrl": Reader(
        (".cleanrl_model",), "lockstep.interop.pytorch.cleanrl:read_cleanrl", "CleanRL checkpoint of PyTorch"
    ),
    "keras": Reader(
        (".keras", ".h5", ".h5f", ".hdf5"),
        "lockstep.interop.keras.reader:read_keras",
        "Keras 2 or 3 model",
        lambda path, head: not path.name.endswith(".caffemodel.h5"),
    ),
    "tf": Reader(
        ("", ".pb", ".index", ".meta"),
        "lockstep.interop.tensorflow.reader:read_tensorflow",
        "TensorFlow SavedModel, frozen graph, checkpoint, TF-Agents policy",
        lambda path, head: not path.is_dir() or (path / "saved_model.pb").exists(),
    ),
    "paddle": Reader(
        (".json", ".pdmodel", ".pdiparams", ".pdparams"),
        "lockstep.interop.paddle.reader:read_paddle",
        "PaddlePaddle program with .pdiparams, or .pdparams",
        lambda path, head: path.suffix != ".json" or b'"pir"' in head,
    ),
    "cntk": Reader(
        (".model", ".dnn"),
        "lockstep.interop.cntk.lowering:read_cntk",
        "CNTK 2 model",
        lambda path, head: head[:1] == b"\x08" or head.startswith(b"B\0C\0N\0"),
    ),
}
"""Format -> reader. To add one: a line here and its folder."""

HEAD = 4096


def format_of(path: Path) -> str:
    """The key in `READERS` for a file.

    Raises:
        FormatError: missing, unreadable, or of no known format.
    """
    if not path.exists():
        index = path.with_name(f"{path.name}.index")
        hint = (
            f"; {index.name} does: TensorFlow wrote a checkpoint of that name, give {index}" if index.exists() else ""
        )
        raise FormatError(f"does not exist{hint}", path=str(path))
    head = b""
    try:
        if not path.is_dir():
            with path.open("rb") as file:
                head = file.read(HEAD)
    except OSError as error:
        raise FormatError(f"cannot be read: {error}", path=str(path)) from error
    suffix = "" if path.is_dir() else path.suffix.lower()
    fits = [name for name, reader in READERS.items() if suffix in reader.suffixes]
    for name in fits:
        if READERS[name].recognise(path, head):
            return name
    known = sorted({suffix for reader in READERS.values() for suffix in reader.suffixes if suffix})
    if not suffix and path.is_dir():
        reason = "of folders, those that `lockstep import` wrote and those with saved_model.pb are read"
    elif fits:
        reason = f"the content is of none of the formats that end in {suffix}"
    else:
        reason = f"readable are {', '.join(known)}"
    raise FormatError(f"no format that is known here: {reason}; name one with format=", path=str(path))


def load(path: Path | str, *, format: str = "", **options: object) -> GraphModule:
    """An imported network as a module, every weight trainable.

    Args:
        path: file or folder of another framework, or a folder that `lockstep import` wrote.
        format: key in `READERS`, where the file's content and suffix do not tell.
        options: of that format's reader, such as `layout="NHWC"`.

    Raises:
        FormatError: damaged, hostile, of an unknown kind, or with an unknown operation; names file, offset and operation.
        ConfigError: an option that the reader does not have.
        MissingExtraError: the format needs an optional package.

    >>> load("nowhere.onnx")
    Traceback (most recent call last):
    lockstep.core.errors.FormatError: nowhere.onnx: does not exist
    """
    path = Path(path)
    if format and format not in READERS:
        raise ConfigError(unknown_name("format", format, READERS))
    read = READERS[format or format_of(path)].read()
    known = list(inspect.signature(read).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"{path}: options {unknown} do not exist for this format; known: {known or 'none'}")
    return read(path, **options)
