"""Batches for a network's data layers: generated (DummyData), from HDF5 files (HDF5Data), or arrays the user gives.

Legend: N rows of a source, B rows of a batch.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import FormatError, InputError
from lockstep.core.extras import require
from lockstep.interop.caffe.fillers import MAX_FILLED, fill
from lockstep.interop.caffe.graph import DATA_LAYERS, data_shapes
from lockstep.interop.caffe.reader import LayerSpec, NetSpec

DEFAULT_BATCH = 32


def read_arrays(path: str | Path) -> dict[str, Tensor]:
    """Arrays by blob name from an `.npz`, float32.

    Raises:
        InputError: it cannot be read, or an entry is not numbers with rows.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path} cannot be read as .npz: {error}", field="data") from error
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) == 0 or array.dtype.kind not in "fiub":
            raise InputError(
                f"{path}: {name!r} is {array.dtype} of shape {array.shape}; rows of numbers expected", field=name
            )
    return {name: torch.from_numpy(np.asarray(array, np.float32)) for name, array in arrays.items()}


class DataSource:
    """What feeds a network's data layers.

    `shapes` are of one batch, to build the network with; `batches()` never ends: sources start again at their end, as
    Caffe's do.

    Args:
        spec: the network.
        arrays: rows by blob name, which go before what a layer says.
        seed: of generated data and of shuffling.

    Raises:
        InputError: a data layer has no source here, or rows do not fit.
        FormatError: a file of HDF5Data is missing or damaged.
    """

    def __init__(self, spec: NetSpec, arrays: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> None:
        self.spec = spec
        self.generator = torch.Generator().manual_seed(seed)
        given = dict(arrays or {})
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._rows: dict[str, Tensor] = {}
        self._dummies: list[LayerSpec] = []
        self._shuffles = False
        declared: dict[str, tuple[int, ...] | None] = dict(spec.inputs)
        for layer in spec.layers:
            if layer.type not in DATA_LAYERS:
                continue
            own = data_shapes(layer)
            declared |= own
            if layer.type == "DummyData" and not set(own) & set(given):
                self._dummies.append(layer)
                self.shapes |= {name: shape for name, shape in own.items() if shape is not None}
            elif layer.type == "HDF5Data" and not set(own) <= set(given):
                param = layer.param("hdf5_data_param")
                self._shuffles = self._shuffles or param.flag("shuffle", False)
                rows = _read_hdf5(layer, Path(spec.path).parent)
                batch = param.integer("batch_size", DEFAULT_BATCH)
                declared |= {name: (batch, *rows[name].shape[1:]) for name in own}
                given = {**rows, **given}
        for name, shape in declared.items():
            if name in given:
                batch = shape[0] if shape else min(DEFAULT_BATCH, len(given[name]))
                self._take(name, given[name], shape, batch)
        for name in given:
            if name not in declared:
                raise InputError(f"the network has no input {name!r}; it has {list(declared)}", field=name)
        self.missing = tuple(name for name in declared if name not in self.shapes)

    def _take(self, name: str, rows: Tensor, shape: tuple[int, ...] | None, batch: int) -> None:
        tail = tuple(rows.shape[1:])
        if shape is not None and math.prod(tail) != math.prod(shape[1:]):
            raise InputError(f"rows of {name!r} have shape {tail}; the network declares {shape[1:]}", field=name)
        if batch < 1 or batch * math.prod(tail) > MAX_FILLED:
            raise InputError(f"a batch of {batch} rows of {name!r}", field=name)
        self._rows[name] = rows if shape is None else rows.reshape(len(rows), *shape[1:])
        self.shapes[name] = (batch, *self._rows[name].shape[1:])

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Batch after batch without end, in the order of the rows (of each pass anew, where a layer says shuffle)."""
        position, order = 0, self._order()
        constant: dict[str, Tensor] = {}
        while True:
            batch = dict(constant)
            for name, rows in self._rows.items():
                at = [order[(position + row) % len(order)] for row in range(self.shapes[name][0])]
                batch[name] = rows[[index % len(rows) for index in at]]
            for layer in self._dummies:
                for name, value in self._generate(layer, constant).items():
                    batch[name] = value
            yield batch
            step = max((self.shapes[name][0] for name in self._rows), default=0)
            position += step
            if self._shuffles and position >= len(order):
                position, order = 0, self._order()

    def _order(self) -> list[int]:
        num = max((len(rows) for rows in self._rows.values()), default=1)
        return torch.randperm(num, generator=self.generator).tolist() if self._shuffles else list(range(num))

    def _generate(self, layer: LayerSpec, constant: dict[str, Tensor]) -> dict[str, Tensor]:
        fillers = layer.param("dummy_data_param").messages("data_filler")
        made = {}
        for index, name in enumerate(layer.tops):
            filler = fillers[min(index, len(fillers) - 1)] if fillers else layer.param("dummy_data_param").message("")
            if name not in constant:
                made[name] = fill(filler, self.shapes[name], self.generator)
                if filler.string("type", "constant") == "constant":
                    constant[name] = made[name]
        return made


def _read_hdf5(layer: LayerSpec, folder: Path) -> dict[str, Tensor]:
    h5py = require("h5py", extra="caffe")
    source = Path(layer.param("hdf5_data_param").string("source"))
    source = source if source.is_absolute() or source.exists() else folder / source
    try:
        names = [line.strip() for line in source.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise layer.fail(f"its source {str(source)!r} cannot be read: {error}") from error
    parts: dict[str, list[np.ndarray]] = {name: [] for name in layer.tops}
    for name in names:
        path = Path(name) if Path(name).exists() else source.parent / name
        try:
            with h5py.File(path, "r") as file:
                for top in layer.tops:
                    parts[top].append(np.asarray(file[top][()], np.float32))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise FormatError(f"layer {layer.name!r} cannot read it: {error}", path=str(path)) from error
    if not names:
        raise layer.fail(f"its source {str(source)!r} lists no files")
    return {top: torch.from_numpy(np.concatenate(arrays)) for top, arrays in parts.items()}
