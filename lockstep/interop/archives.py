"""Zip archives nobody vouches for: `.pt`, `.keras`, `.zip` of Stable-Baselines3, `.npz`."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

from lockstep.core.errors import FormatError

MAX_MEMBERS = 1 << 16
MAX_GROWTH = 64
"""How many times its own size an archive may unpack to (beside 16 MiB): weights compress little, zip bombs a lot."""
SPARE_BYTES = 1 << 24


class Archive:
    """Members of a zip file by name; none is unpacked to disk.

    Args:
        path: of the file.
        expected: what it should be, for messages.
        content: its bytes, for an archive inside of the file.

    Raises:
        FormatError: no zip file, cut off, or one that unpacks to more than its size explains.
    """

    def __init__(self, path: Path, expected: str, content: bytes | None = None) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path if content is None else io.BytesIO(content))
            infos = self._zip.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
            raise FormatError(f"is not {expected}, or is cut off: {error}", path=str(path)) from error
        total = sum(info.file_size for info in infos)
        size = path.stat().st_size if content is None else len(content)
        if len(infos) > MAX_MEMBERS or total > MAX_GROWTH * size + SPARE_BYTES:
            raise FormatError(f"unpacks to {total} bytes in {len(infos)} files: hostile or damaged", path=str(path))
        self.names = [info.filename for info in infos]
        self._sizes = {info.filename: info.file_size for info in infos}

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def read(self, name: str) -> bytes:
        """One member's bytes.

        Raises:
            FormatError: it is missing, damaged or longer than it says.
        """
        if name not in self._sizes:
            raise FormatError(f"lacks {name!r}; it holds {self.names[:8]}", path=str(self.path))
        try:
            with self._zip.open(name) as member:
                data = member.read(self._sizes[name] + 1)
        except (
            zipfile.BadZipFile,
            zlib.error,
            OSError,
            EOFError,
            ValueError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise FormatError(f"member {name!r} cannot be read: {error}", path=str(self.path)) from error
        if len(data) != self._sizes[name]:
            raise FormatError(
                f"member {name!r} has {len(data)} bytes; {self._sizes[name]} were declared", path=str(self.path)
            )
        return data
