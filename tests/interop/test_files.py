"""A folder that is replaced when the new one is complete: the earlier one is never lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.core.errors import ConfigError
from lockstep.interop.files import folder_replaced_when_checked


def write(path: Path, words: str) -> None:
    with folder_replaced_when_checked(path, "marker") as temporary:
        (temporary / "marker").write_text(words)


@pytest.mark.parametrize(("error", "raised"), [(OSError, ConfigError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_stopped_between_the_renames(
    error: type[BaseException], raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "made", Path.replace
    write(path, "first")

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".unchecked"):
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(raised):
            write(path, "second")
    assert (path / "marker").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_killed_between_the_renames(tmp_path: Path) -> None:
    path = tmp_path / "made"
    write(path, "first")
    path.rename(tmp_path / ".made.old")
    with pytest.raises(ZeroDivisionError), folder_replaced_when_checked(path, "marker"):
        raise ZeroDivisionError
    assert (path / "marker").read_text() == "first"
    path.rename(tmp_path / ".made.old")
    write(path, "second")
    assert (path / "marker").read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]
