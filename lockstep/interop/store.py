"""Models kept on this machine under names: a folder of folders, each of which any reader of models takes as it is.

    STORE/org--name/           the model's files, and lockstep.json: where it came from and when
    STORE/.partial-org--name/  a pull that has not ended; the next one goes on where it stopped

A model appears under its name when all of it is there, by one rename.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError, FormatError, InputError, unknown_name
from lockstep.interop.hf.hub import download_files, is_hub_id, list_files
from lockstep.interop.hf.json_file import read_object

RECORD = "lockstep.json"
_PART = ".part"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[A-Za-z0-9][\w.-]*)?")
_CHUNK = 8 << 20
Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes of it that are here, and its size."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """One model of a store."""

    name: str
    folder: Path
    source: str
    """What it was pulled from."""
    revision: str
    """Commit on the hub; empty for local sources."""
    format: str
    """"safetensors", "pickle" or "gguf"."""
    num_bytes: int
    pulled: float
    """Seconds since 1970."""

    @property
    def path(self) -> Path:
        """What a reader of models is given: the one GGUF file, or the folder."""
        files = sorted(self.folder.glob("*.gguf"))
        return files[0] if files else self.folder


class ModelStore:
    """A store in a folder, which is made when something is pulled."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def models(self, told: Callable[[FormatError], None] = lambda error: None) -> list[StoredModel]:
        """All of them, by name.

        Args:
            told: hears of models whose record is damaged; they are left out.
        """
        if not self.root.is_dir():
            return []
        found = []
        for folder in self.root.iterdir():
            if (folder / RECORD).is_file() and folder.name[0] != ".":
                try:
                    found.append(_read(folder))
                except FormatError as error:
                    told(error)
        return sorted(found, key=lambda model: model.name)

    def find(self, name: str) -> StoredModel | None:
        """The model of this name; None if there is none."""
        if not _NAME.fullmatch(name) or ".." in name:
            return None
        folder = self.root / _flat(name)
        return _read(folder) if (folder / RECORD).is_file() else None

    def near(self, name: str) -> list[str]:
        """Names of the store that somebody who wrote `name` may have meant, the nearest first; three at most."""
        scores = {model.name: _nearness(name.lower(), model.name.lower()) for model in self.models()}
        return sorted((known for known, score in scores.items() if score >= 0.6), key=lambda known: -scores[known])[:3]

    def get(self, name: str) -> StoredModel:
        """The model of this name.

        Raises:
            InputError: there is none; the message has the nearest name.
        """
        found = self.find(name)
        if found is None:
            known = [model.name for model in self.models()]
            if not known:
                raise InputError(f"the store {self.root} is empty; `lockstep pull` fills it", field="model")
            raise InputError(unknown_name("model", name, known), field="model")
        return found

    def remove(self, name: str) -> StoredModel:
        """Takes the model off the disk; it is gone from the store at once.

        Raises:
            InputError: there is none of this name.
            ConfigError: the system does not let us.
        """
        found = self.whole_or_damaged(name)
        try:
            trash = Path(tempfile.mkdtemp(prefix=".removed-", dir=self.root))
            found.folder.rename(trash / "model")
            shutil.rmtree(trash)
        except OSError as error:
            raise ConfigError(f"cannot remove {found.folder}: {error}") from error
        return found

    def whole_or_damaged(self, name: str) -> StoredModel:
        """The model; of one with a damaged record what its folder tells.

        Raises:
            InputError: there is none of this name.
        """
        try:
            return self.get(name)
        except FormatError:
            folder = self.root / _flat(name)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            return StoredModel(name=name, folder=folder, source="", revision="", format="", num_bytes=size, pulled=0.0)

    def pull(
        self,
        source: str,
        *,
        name: str = "",
        file: str = "",
        revision: str | None = None,
        endpoint: str | None = None,
        progress: Progress = lambda file, done, size: None,
    ) -> StoredModel:
        """Copies a model into the store, in place of one that had its name. What an earlier pull left is not fetched again.

        Args:
            source: a GGUF file, a model folder, or `organisation/name` on the hub.
            name: in the store; empty: the hub id, or the last part of the path without its ending.
            file: of a source with several GGUF files the one to take; a pattern such as `*q4_0.gguf`.
            revision: branch, tag or commit on the hub.
            endpoint: address of another hub; None: the library's.

        Raises:
            InputError: there is no such source; a name that cannot be one.
            FormatError: the source holds no model.
            ConfigError: the disk is full or does not let us write.
        """
        path = Path(source).expanduser()
        local = path.exists()
        if not local and not is_hub_id(source):
            raise InputError(f"{source} is neither here nor a hub id such as org/name", field="source")
        name = name or (source if not local else path.stem if path.is_file() else path.resolve().name)
        if not _NAME.fullmatch(name) or ".." in name:
            raise InputError(f"{name!r} cannot be a model's name; give one such as org/name or name:tag", field="name")
        partial = self.root / f".partial-{_flat(name)}"
        try:
            if local:
                commit, wanted = "", _local_files(path, file)
                origin = f"{path.resolve()} {path.stat().st_mtime_ns} {wanted}"
            else:
                commit, wanted = list_files(source, file=file, revision=revision, endpoint=endpoint)
                origin = f"{source}@{commit} {wanted}"
            format = _format(wanted, source)
            partial.mkdir(parents=True, exist_ok=True)
            _forget_others(partial, origin)
            self._check_room(partial, wanted)
            if local:
                for item, size in wanted.items():
                    _copy(path if path.is_file() else path / item, partial / item, size, progress)
            else:
                download_files(source, wanted, partial, revision=commit, endpoint=endpoint, progress=progress)
            return self._finish(partial, name, source if not local else str(path.resolve()), commit, format)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ConfigError(f"the disk of {self.root} is full; free some and pull again: it goes on") from error
            raise ConfigError(f"cannot write into the store {self.root}: {error}") from error

    def _check_room(self, partial: Path, wanted: dict[str, int]) -> None:
        found = [path for item in wanted for path in (partial / item, partial / (item + _PART)) if path.is_file()]
        there = {path.name.removesuffix(_PART): path.stat().st_size for path in found}
        need = sum(size - there.get(item, 0) for item, size in wanted.items())
        free = shutil.disk_usage(self.root).free
        if need > free:
            raise ConfigError(
                f"the model needs {need / 2**20:.0f} MiB more and the disk of {self.root} has {free / 2**20:.0f} MiB "
                "free; free some, or give another --store"
            )

    def _finish(self, partial: Path, name: str, source: str, commit: str, format: str) -> StoredModel:
        (partial / _ORIGIN).unlink(missing_ok=True)
        files = [path for path in partial.rglob("*") if path.is_file()]
        made = StoredModel(
            name=name,
            folder=self.root / _flat(name),
            source=source,
            revision=commit,
            format=format,
            num_bytes=sum(path.stat().st_size for path in files),
            pulled=time.time(),
        )
        record = {key: value for key, value in asdict(made).items() if key != "folder"}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        if made.folder.exists():
            old = Path(tempfile.mkdtemp(prefix=".removed-", dir=self.root))
            made.folder.rename(old / "model")
            partial.rename(made.folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(made.folder)
        return made


_ORIGIN = ".origin"
"""Of a partial pull: from where, so that two sources never mix."""


def _nearness(one: str, other: str) -> float:
    """Between 0 and 1, with or without the organisation; a name that begins with the other is near.

    >>> _nearness("tiny", "org/tiny-instruct"), _nearness("gpt", "org/tiny") < 0.6
    (0.9, True)
    """
    pairs = [(one, other), (one.rpartition("/")[2], other.rpartition("/")[2])]
    if all(pairs[1]) and (pairs[1][0].startswith(pairs[1][1]) or pairs[1][1].startswith(pairs[1][0])):
        return 0.9
    return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)


def _flat(name: str) -> str:
    return name.replace("/", "--").replace(":", "++")


def _read(folder: Path) -> StoredModel:
    values = read_object(folder / RECORD)
    try:
        return StoredModel(**{**values, "folder": folder})
    except TypeError as error:
        raise FormatError(
            f"is no record of a model ({error}); remove the model by `lockstep rm` and pull it again",
            path=str(folder / RECORD),
        ) from error


def _format(names: Iterable[str], source: str) -> str:
    """Of the weights among the files of a model."""
    endings = {Path(name).suffix for name in names}
    for ending, format in ((".gguf", "gguf"), (".safetensors", "safetensors"), (".bin", "pickle")):
        if ending in endings:
            return format
    raise FormatError("holds no weights (*.safetensors, *.gguf)", path=source)


def _local_files(path: Path, file: str) -> dict[str, int]:
    """Name and size of what makes the model."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path} is no GGUF file; give one, or a model folder", field="source")
        return {path.name: path.stat().st_size}
    ggufs = sorted(path.glob(file or "*.gguf"))
    if (path / "config.json").is_file() and not file:
        chosen = [
            item for item in _walk(path) if item.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model", ".bin")
        ]
    elif len(ggufs) == 1:
        chosen = ggufs
    else:
        names = ", ".join(item.name for item in ggufs[:8])
        raise FormatError(
            f"holds {len(ggufs)} GGUF files{f': {names}; choose one by --file' if ggufs else ''}", path=str(path)
        )
    return {item.name: item.stat().st_size for item in chosen}


def _walk(path: Path) -> Iterator[Path]:
    yield from (item for item in sorted(path.iterdir()) if item.is_file() and item.name != RECORD)


def _forget_others(partial: Path, origin: str) -> None:
    """What lies in the partial folder from another source, or from the same as it was before, goes."""
    mark = partial / _ORIGIN
    if mark.exists() and mark.read_text("utf-8") == origin:
        return
    for item in partial.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    mark.write_text(origin, "utf-8")


def _copy(source: Path, target: Path, size: int, progress: Progress) -> None:
    """Goes on where an earlier copy stopped; the file has its name when it is whole and on the disk."""
    if target.is_file() and target.stat().st_size == size:
        progress(target.name, size, size)
        return
    part = target.with_name(target.name + _PART)
    done = part.stat().st_size if part.exists() else 0
    if done > size:
        done = 0
    with source.open("rb") as reading, part.open("r+b" if done else "wb") as writing:
        reading.seek(done)
        writing.seek(done)
        while chunk := reading.read(_CHUNK):
            writing.write(chunk)
            done += len(chunk)
            progress(target.name, done, size)
        writing.truncate()
        writing.flush()
        os.fsync(writing.fileno())
    if done != size:
        raise FormatError(f"changed while it was copied: {done} bytes of {size}", path=str(source))
    part.rename(target)


def describe(model: StoredModel) -> dict[str, Any]:
    """What `lockstep show` tells: architecture, parameters, how the weights are stored, context, chat template."""
    from lockstep.interop.weights import open_weights
    from lockstep.models.families import family_of

    source = open_weights(model.path)
    values = source.config()
    family = family_of(values)
    config = family.read_config(values)
    sizes = family.sizes(config)
    stored: dict[str, int] = {}
    for name in source.names():
        blocks = source.quantised(name)
        kind = str(source.tensor(name).dtype).removeprefix("torch.") if blocks is None else str(blocks.kind)
        stored[kind] = stored.get(kind, 0) + 1
    return {
        "name": model.name,
        "source": model.source,
        "format": model.format,
        "bytes": model.num_bytes,
        "pulled": time.strftime("%Y-%m-%d %H:%M", time.localtime(model.pulled)),
        "architecture": values["architectures"][0],
        "parameters": sizes.total,
        "stored as": ", ".join(
            f"{kind} ({num} tensors)" for kind, num in sorted(stored.items(), key=lambda kv: -kv[1])
        ),
        "context": config.max_context,
        "vocabulary": config.vocab_size,
        "chat template": "yes" if _has_template(source.tokenizer()) else "no",
    }


def _has_template(described: Path | dict[str, Any]) -> bool:
    if isinstance(described, dict):
        return bool(described.get("tokenizer.chat_template"))
    if (described / "chat_template.jinja").is_file():
        return True
    path = described / "tokenizer_config.json"
    return path.is_file() and bool(read_object(path).get("chat_template"))
