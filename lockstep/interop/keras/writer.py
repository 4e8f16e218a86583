"""Tuned weights back into the Keras file they came from: the same architecture, which Keras opens again."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from lockstep.core.errors import ConfigError
from lockstep.core.extras import require
from lockstep.interop.files import replaced_when_checked
from lockstep.interop.keras.files import WEIGHTS, KerasFile
from lockstep.interop.keras.reader import ORIGINAL, build
from lockstep.models.graph.module import GraphModule


def save_keras(module: GraphModule, path: Path | str) -> None:
    """Write the file that `module` was read from, with the weights it has now.

    Args:
        path: ends in `.keras` or `.h5`, as the original did.

    Raises:
        ConfigError: it was not read from a Keras file with its architecture, or the path cannot be written.
    """
    h5py = require("h5py", extra="keras")
    path = Path(path)
    if ORIGINAL not in module.original:
        raise ConfigError("this network was not read from a Keras file")
    content = module.original[ORIGINAL]
    file = KerasFile(path, content)
    if not file.config:
        raise ConfigError("this network was read from weights alone; load them into its model with Keras")
    _, places = build(file)
    tensors = module.named_tensors()
    held = content
    if file.is_zip:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        held = members[WEIGHTS]
    buffer = io.BytesIO(held)
    with h5py.File(buffer, "r+") as store:
        for place in places:
            if place.tensor not in tensors:
                continue  # nothing of the policy reads it
            stored = tensors[place.tensor].detach().cpu().numpy()
            for dataset, array in zip(place.datasets, place.back(stored), strict=True):
                store[dataset][...] = array
    with replaced_when_checked(path, ".keras" if file.is_zip else ".h5") as temporary:
        if not file.is_zip:
            temporary.write_bytes(buffer.getvalue())
            return
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, buffer.getvalue() if name == WEIGHTS else data)
