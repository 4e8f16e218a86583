"""Whatever a user calls a model: a GGUF file, a model folder or a hub id."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from lockstep.core.errors import FormatError, InputError
from lockstep.core.tensors import TensorSource
from lockstep.interop.gguf.source import GGUFSource
from lockstep.interop.hf.folder import HFFolder
from lockstep.models.dict_source import DictSource


def open_weights(
    model: str | Path,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    offline: bool = False,
    single_file: bool = False,
) -> TensorSource:
    """Open a model for reading.

    Args:
        model: a `.gguf` file (of a split model the first), a folder with `config.json`, a folder with one `.gguf` file,
            the directory of a run that trained a language model, or `organisation/name` on the hub.
        revision, cache, offline: of the hub.
        single_file: a `.safetensors` file will do, though it has neither config nor tokenizer; nothing is fetched then.

    Raises:
        InputError: there is no such model.
        FormatError: it cannot be read; the message names file and tensor.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        return GGUFSource.open(path)
    if single_file and path.suffix == ".safetensors":
        return _open_file(path)
    if single_file and not path.is_dir():
        raise InputError(f"{model} is no model folder, GGUF file or safetensors file here", field="model")
    if (path / "model" / "config.json").is_file():
        path = path / "model"
        model = path
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return GGUFSource.open(files[0])
        if files:
            raise InputError(f"{path} holds {len(files)} GGUF files; name one, such as {files[0]}", field="model")
    return HFFolder.open(model, revision=revision, cache=cache, offline=offline)


def _open_file(path: Path) -> TensorSource:
    try:
        return DictSource(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"is not a readable safetensors file: {error}", path=str(path)) from error
