"""Complete training states on disk; a kill at any instruction leaves the previous one loadable.

    write step_N in a hidden folder -> fsync -> rename to step_N -> fsync the parent -> only then prune older ones

A checkpoint is therefore whole or not there. Damage that happens later (a disk's lost blocks, an editor) is found by
size and checksum when it is loaded, and the one before it is taken instead, saying so.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lockstep.checkpoint.state import array_kinds, state_from_json, state_to_json
from lockstep.checkpoint.tensors import read_tensors, write_tensors
from lockstep.core.errors import CheckpointError

FORMAT_VERSION = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"

# `.replaced` is what a second save of the same step leaves for an instant: rename cannot swap two folders portably.
_FOLDER = re.compile(r"^step_(\d{12})(\.replaced)?$")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder must contain, byte for byte."""

    format_version: int
    step: int
    score: float | None
    tensors_bytes: int
    tensors_crc32: int
    state_bytes: int
    state_crc32: int


def warn_on_stderr(message: str) -> None:
    """Default `report` of a Checkpointer."""
    print(f"lockstep: {message}", file=sys.stderr)


class Checkpointer:
    """The checkpoints of one run, in one folder with one writing process.

    Args:
        folder: created when the first checkpoint is saved.
        keep_last: how many of the newest to keep, at least 1.
        keep_best: also keep the one of the highest score.
        report: told in one sentence when a damaged checkpoint is passed over.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_best: bool = True,
        report: Callable[[str], None] = warn_on_stderr,
    ) -> None:
        if keep_last < 1:
            raise CheckpointError(f"keep_last={keep_last}; expected 1 or more: with 0 there is nothing to resume from")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._report = report

    def save(self, step: int, state: dict[str, Any], score: float | None = None) -> Path:
        """Write a complete state and prune what is no longer kept.

        Checkpoints of later steps are dropped too: a run that resumed from an older state has left their line.

        Args:
            step: environment or optimiser step; names the folder.
            state: see `state_to_json`. Contiguous CPU arrays are written from where they lie, without a copy.
            score: higher is better; None or not finite never counts as best.

        Returns:
            The folder of the new checkpoint.

        Raises:
            CheckpointError: a leaf cannot be written, or the disk refuses.
        """
        if not 0 <= step < 10**12:
            raise CheckpointError(f"step={step}; expected 0 <= step < 10**12")
        step = int(step)
        tree, arrays = state_to_json(state)
        target = self.folder / f"step_{step:012d}"
        scratch = self.folder / f".writing-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_scratch()
            scratch.mkdir()
            tensors_bytes, tensors_crc32 = write_tensors(scratch / TENSORS, arrays)
            text = json.dumps(tree, allow_nan=False).encode()
            _write_synced(scratch / STATE, text)
            finite = float(score) if score is not None and math.isfinite(score) else None
            manifest = Manifest(FORMAT_VERSION, step, finite, tensors_bytes, tensors_crc32, len(text), zlib.crc32(text))
            _write_synced(scratch / MANIFEST, _manifest_text(manifest))
            _sync_folder(scratch)
            if target.exists():
                replaced = target.with_name(target.name + ".replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                target.rename(replaced)
            scratch.rename(target)
            _sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise CheckpointError(f"checkpoint {target} could not be written: {error}") from error
        self._prune(step)
        return target

    def load(self, path: Path | None = None) -> tuple[int, dict[str, Any]]:
        """Read a state back; all arrays are on the CPU.

        Args:
            path: a checkpoint folder; None takes the newest that is undamaged.

        Returns:
            (step, state).

        Raises:
            CheckpointError: nothing to load, or `path` is missing or damaged; names file and reason.
        """
        if path is not None:
            return read_checkpoint(Path(path))
        reasons = []
        for folder in reversed(self.checkpoints()):
            try:
                loaded = read_checkpoint(folder)
            except CheckpointError as error:
                if not folder.exists():
                    return self.load()  # pruned while it was read, so a newer one is complete
                reasons.append(str(error))
                continue
            if reasons:
                self._report(f"resuming from {folder}, because the newer one is damaged: {'; '.join(reasons)}")
            return loaded
        if reasons:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged: {'; '.join(reasons)}")
        raise CheckpointError(f"no checkpoint in {self.folder}; train first, or name another run")

    def latest(self) -> Path | None:
        """Folder of the newest checkpoint, None if there is none. Its content is not checked."""
        folders = self.checkpoints()
        return folders[-1] if folders else None

    def best(self) -> Path | None:
        """Folder of the highest score, the newest among equals; None if no checkpoint has a score."""
        scored = []
        for folder in self.checkpoints():
            try:
                score = read_manifest(folder).score
            except CheckpointError:
                continue  # a damaged one cannot be the best; load() reports it
            if score is not None:
                scored.append((score, folder))
        return max(scored, key=lambda pair: (pair[0], pair[1].name))[1] if scored else None

    def checkpoints(self) -> list[Path]:
        """Folders of all checkpoints, oldest step first."""
        if not self.folder.is_dir():
            return []
        found = []
        for folder in self.folder.iterdir():
            matched = _FOLDER.match(folder.name)
            if matched:
                found.append((int(matched[1]), matched[2] is None, folder))
        return [folder for _, _, folder in sorted(found)]

    def _prune(self, step: int) -> None:
        folders = self.checkpoints()
        name = f"step_{step:012d}"
        older = [folder for folder in folders if folder.name <= name]
        keep = set(older[-self.keep_last :])
        abandoned = [folder for folder in folders if folder.name > name]
        for folder in abandoned:
            _remove(folder)
        best = self.best() if self.keep_best else None
        for folder in older:
            if folder not in keep and folder != best:
                _remove(folder)

    def _remove_scratch(self) -> None:
        for leftover in self.folder.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self.folder.glob(".removing-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def read_checkpoint(folder: Path) -> tuple[int, dict[str, Any]]:
    """(step, state) of one checkpoint folder, verified.

    Raises:
        CheckpointError: missing, truncated, damaged or of another format; names file and reason.
    """
    manifest = read_manifest(folder)
    path = folder / STATE
    text = _read(path)
    if len(text) != manifest.state_bytes:
        raise CheckpointError(f"{path}: {len(text)} bytes, expected {manifest.state_bytes}: the file is truncated")
    if zlib.crc32(text) != manifest.state_crc32:
        raise CheckpointError(f"{path}: checksum does not match manifest.json: the content is damaged")
    tree = json.loads(text)
    arrays = read_tensors(
        folder / TENSORS, array_kinds(tree), size=manifest.tensors_bytes, crc32=manifest.tensors_crc32
    )
    return manifest.step, state_from_json(tree, arrays)


def read_manifest(folder: Path) -> Manifest:
    """The verified manifest of a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, of another format version, or of another step than the folder's name says.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    text = _read(path)
    try:
        document = json.loads(text)
        body, crc = document["body"], document["crc32"]
        version = body["format_version"]
        if zlib.crc32(_canonical(body)) != crc:
            raise CheckpointError(f"{path}: checksum does not match: the content is damaged")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version}, expected {FORMAT_VERSION}; load it with the version that wrote it"
            )
        manifest = Manifest(**body)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: malformed ({error!r}): the content is damaged") from error
    matched = _FOLDER.match(folder.name)
    if matched and int(matched[1]) != manifest.step:
        raise CheckpointError(
            f"{path}: is of step {manifest.step}, the folder says {int(matched[1])}: renamed by hand?"
        )
    return manifest


def _manifest_text(manifest: Manifest) -> bytes:
    body = asdict(manifest)
    return json.dumps({"body": body, "crc32": zlib.crc32(_canonical(body))}, indent=2).encode()


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    # Renamed first: a kill in the middle of a removal must not leave half a checkpoint under a valid name.
    doomed = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)
