"""What a Keras file holds: the model's configuration as JSON, and arrays by layer. Nothing of a file is executed.

`.keras` is a zip of config.json and model.weights.h5, whose groups are numbered by class ("layers/dense_1/vars/0"); `.h5` has
the configuration in an attribute and its arrays under the layers' own names.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.core.errors import FormatError
from lockstep.interop.archives import MAX_GROWTH, SPARE_BYTES, Archive
from lockstep.interop.hdf5 import HDF5
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
            self.config = json_of(archive.read(CONFIG), path)
            self._hdf5 = HDF5(archive.read(WEIGHTS), path)
        else:
            self._hdf5 = HDF5(self.content, path)
        self._h5 = self._hdf5.root
        if not self.is_zip:
            text = self._attribute("model_config")
            self.config = json_of(text, path) if text else {}
        self._budget = MAX_GROWTH * len(self.content) + SPARE_BYTES

    def _attribute(self, name: str) -> bytes:
        try:
            value = self._hdf5.attribute(self._h5, name)
            value = b"" if value is None else value
        except FormatError:
            raise
        except Exception as error:  # the HDF5 library's errors have no common root
            raise FormatError(f"its attribute {name} cannot be read: {error}", path=str(self.path)) from error
        # Bytes that are no text come as lone surrogates; they go on as bytes, for the reader of JSON to refuse.
        return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else bytes(value)

    def places(self, layers: list[dict[str, Any]], weighted: Collection[str]) -> dict[str, str]:
        """Layer's name -> its group.

        Args:
            layers: of a configuration.
            weighted: classes of layers that have weights.

        Raises:
            FormatError: the file's layers are others, and not as many.
        """
        if self._has_names():
            root = self._root()
            named = {_name(layer): f"{root}{_name(layer)}" for layer in layers}
            stored = [group for group, _ in self.stored()]
            if set(stored) <= set(named.values()):
                return named
            # Names count up within a process, so that a model built again has others: Keras goes by their order.
            wanted = [_name(layer) for layer in layers if layer["class_name"] in weighted]
            if len(wanted) != len(stored):
                raise FormatError(
                    f"holds weights of {len(stored)} layers, {stored[:4]}, and the configuration has {len(wanted)}, "
                    f"{wanted[:4]}",
                    path=str(self.path),
                )
            return {**named, **dict(zip(wanted, stored, strict=True))}
        used: Counter[str] = Counter()
        found = {}
        for layer in layers:
            key = _snake(str(layer["class_name"]))
            found[_name(layer)] = f"layers/{key}_{used[key]}" if used[key] else f"layers/{key}"
            used[key] += 1
        return found

    def stored(self) -> list[tuple[str, list[str]]]:
        """(group, its arrays) of each layer with weights: in the order of the model where the file tells it, else
        convolutions first, then by number.

        Raises:
            FormatError: damaged.
        """
        try:
            if self._has_names():
                root = self._root()
                owner = self._h5[root] if root else self._h5
                names = self._hdf5.attribute(owner, "layer_names")
                texts = [x.decode() if isinstance(x, bytes) else str(x) for x in (owner if names is None else names)]
            else:
                root = "layers/"
                texts = sorted(self._h5["layers"], key=lambda text: ("conv" not in text, _numbered(text)))
        except FormatError:
            raise
        except Exception as error:  # see _attribute
            raise FormatError(f"its layers cannot be read: {error}", path=str(self.path)) from error
        found = [(f"{root}{text}", self.datasets(f"{root}{text}")) for text in texts]
        return [(group, arrays) for group, arrays in found if arrays]

    def _has_names(self) -> bool:
        """Whether groups have the layers' own names."""
        return not self.is_zip and "layers" not in self._h5

    def _root(self) -> str:
        return "model_weights/" if "model_weights" in self._h5 else ""

    def datasets(self, group: str) -> list[str]:
        """Paths of a group's arrays in the order of its layer's weights."""
        try:
            if group not in self._h5:
                return []
            names = self._hdf5.attribute(self._h5[group], "weight_names")
            if names is not None:
                texts = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
                return [f"{group}/{name}" for name in texts]
            found: list[str] = []
            self._h5[group].visit(found.append)
        except FormatError:
            raise
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


def _numbered(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition("_")
    return (stem, int(number)) if number.isdigit() else (name, 0)


def _snake(name: str) -> str:
    """Keras' own way from a class to a group: "BatchNormalization" -> "batch_normalization".

    >>> _snake("Conv2D"), _snake("InputLayer"), _snake("LSTM")
    ('conv2d', 'input_layer', 'lstm')
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def json_of(data: bytes, path: Path) -> dict[str, Any]:
    """A model's configuration.

    Raises:
        FormatError: it is none.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its configuration is no JSON: {error}", path=str(path)) from error
    if not isinstance(value, dict) or "class_name" not in value or not isinstance(value.get("config"), dict):
        raise FormatError("its configuration is not of a Keras model", path=str(path))
    return value
