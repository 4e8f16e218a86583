"""What a Keras file holds: the model's configuration as JSON, and arrays by layer. Nothing of a file is executed.

`.keras` is a zip of config.json and model.weights.h5, whose groups are numbered by class ("layers/dense_1/vars/0"); `.h5` has
the configuration in an attribute and its arrays under the layers' own names.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.core.errors import FormatError
from lockstep.core.extras import require
from lockstep.interop.archives import MAX_GROWTH, SPARE_BYTES, Archive
from lockstep.interop.wire import read_file

MAX_BYTES = 1 << 32
WEIGHTS, CONFIG = "model.weights.h5", "config.json"


class KerasFile:
    """An open file: `config` (empty for weights alone) and arrays.

    Raises:
        FormatError: damaged or of another kind.
        MissingExtraError: h5py is not installed.
    """

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        self.path = path
        self.content = read_file(path, MAX_BYTES) if content is None else content
        self.is_zip = self.content[:2] == b"PK"
        if self.is_zip:
            archive = Archive(path, "a .keras file", self.content)
            self.config = _json(archive.read(CONFIG), path)
            self._h5 = _open(archive.read(WEIGHTS), path)
        else:
            self._h5 = _open(self.content, path)
            text = self._attribute("model_config")
            self.config = _json(text, path) if text else {}
        self._budget = MAX_GROWTH * len(self.content) + SPARE_BYTES

    def _attribute(self, name: str) -> bytes:
        try:
            value = self._h5.attrs.get(name, b"")
        except Exception as error:  # the HDF5 library's errors have no common root
            raise FormatError(f"its attribute {name} cannot be read: {error}", path=str(self.path)) from error
        # Bytes that are no text come as lone surrogates; they go on as bytes, for the reader of JSON to refuse.
        return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else bytes(value)

    def places(self, layers: list[dict[str, Any]]) -> dict[str, str]:
        """Layer's name -> its group."""
        if not self.is_zip and "layers" not in self._h5:
            root = "model_weights/" if "model_weights" in self._h5 else ""
            return {_name(layer): f"{root}{_name(layer)}" for layer in layers}
        used: Counter[str] = Counter()
        found = {}
        for layer in layers:
            key = _snake(str(layer["class_name"]))
            found[_name(layer)] = f"layers/{key}_{used[key]}" if used[key] else f"layers/{key}"
            used[key] += 1
        return found

    def datasets(self, group: str) -> list[str]:
        """Paths of a group's arrays in the order of its layer's weights."""
        try:
            if group not in self._h5:
                return []
            names = self._h5[group].attrs.get("weight_names")
            if names is not None:
                texts = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
                return [f"{group}/{name}" for name in texts]
            found: list[str] = []
            self._h5[group].visit(found.append)
        except Exception as error:  # see _attribute
            raise FormatError(f"its group {group!r} cannot be read: {error}", path=str(self.path)) from error
        arrays = [name for name in found if re.search(r"vars/\d+$", name)]
        return [f"{group}/{name}" for name in sorted(arrays, key=_numbers)]

    def array(self, name: str) -> np.ndarray:
        """One array as float32.

        Raises:
            FormatError: missing, damaged, no numbers, or larger than the file explains.
        """
        try:
            dataset = self._h5[name]
            if dataset.dtype.kind not in "fiu" or dataset.nbytes > self._budget:
                raise FormatError(f"array {name!r} is {dataset.dtype} {dataset.shape}", path=str(self.path))
            self._budget -= dataset.nbytes
            return np.asarray(dataset[()], np.float32)
        except FormatError:
            raise
        except Exception as error:  # see _attribute
            raise FormatError(f"array {name!r} cannot be read: {error}", path=str(self.path)) from error


def _name(layer: dict[str, Any]) -> str:
    return str(layer["config"]["name"])


def _numbers(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition("/")
    # A bidirectional layer's forward half stands before its backward half.
    return stem.replace("forward_layer", "0").replace("backward_layer", "1"), int(number)


def _snake(name: str) -> str:
    """Keras' own way from a class to a group: "BatchNormalization" -> "batch_normalization".

    >>> _snake("Conv2D"), _snake("InputLayer"), _snake("LSTM")
    ('conv2d', 'input_layer', 'lstm')
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its configuration is no JSON: {error}", path=str(path)) from error
    if not isinstance(value, dict) or "class_name" not in value or not isinstance(value.get("config"), dict):
        raise FormatError("its configuration is not of a Keras model", path=str(path))
    return value


def _open(content: bytes, path: Path) -> Any:
    h5py = require("h5py", extra="keras")
    try:
        return h5py.File(io.BytesIO(content), "r")
    except Exception as error:  # see KerasFile._attribute
        raise FormatError(f"is no HDF5 file of Keras, or is damaged: {error}", path=str(path)) from error
