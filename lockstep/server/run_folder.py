"""Where a run writes its model, and whether it has written another one since."""

from __future__ import annotations

from pathlib import Path

Signature = tuple[tuple[str, int, int, int], ...]


def run_folder(model: Path) -> Path | None:
    """The folder that a run writes its model to; None where the model is no run's.

    Args:
        model: a run's directory, or one of the model folders in it.
    """
    if (model / "run.json").is_file():
        return model / "model"
    if model.name.startswith("model") and (model.parent / "run.json").is_file():
        return model
    return None


def signature(folder: Path) -> Signature:
    """Name, time, size and inode of the files that make a model; empty while one is being exchanged for another."""
    try:
        found = [(path.name, path.stat()) for path in (folder / "config.json", *sorted(folder.glob("*.safetensors")))]
    except OSError:
        return ()
    return tuple((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in found)
