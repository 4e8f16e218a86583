"""Hub ids, without a network: the cache alone, and the words when it does not suffice."""

from __future__ import annotations

import socket
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lockstep.core.errors import InputError
from lockstep.interop.hf import HFFolder, hub, save_folder
from lockstep.interop.hf.hub import download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache with one model in it, laid out as the library lays it out."""
    model = tmp_path / "hub" / "models--org--tiny"
    save_folder(model / "snapshots" / COMMIT, {"model_type": "llama"}, {"t": torch.ones(3)})
    for name in ("main", "v1"):
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / name).write_text(COMMIT)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_the_cache_is_enough(cache: Path, revision: str | None) -> None:
    source = HFFolder.open("org/tiny", revision=revision, cache=cache, offline=True)
    assert source.folder.name == COMMIT
    assert torch.equal(source.tensor("t"), torch.ones(3))


@pytest.mark.parametrize(("hub_id", "revision"), [("org/other", None), ("org/tiny", "v2")])
def test_not_cached_and_offline(cache: Path, hub_id: str, revision: str | None) -> None:
    with pytest.raises(InputError, match=rf"'{hub_id}'.* is not in the cache and offline was asked for"):
        HFFolder.open(hub_id, revision=revision, cache=cache, offline=True)


@pytest.mark.parametrize("text", ["a/b/c", "/etc/passwd", "../up", "a..b/c", "a b", "-x/y", "org--tiny"])
def test_what_is_no_hub_id(text: str) -> None:
    with pytest.raises(InputError, match=r"does not exist|is a file"):
        HFFolder.open(text, offline=True)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "neither a folder here nor a model on the hub"),
        ("GatedRepoError", "accept its terms"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("ConnectionError", "could not be fetched"),
    ],
)
def test_the_hubs_refusals_are_explained(error: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("huggingface_hub")
    kind = type(error, (OSError,), {})

    def snapshot_download(*_: object, **__: object) -> str:
        raise kind("no")

    fake.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", fake)
    with pytest.raises(InputError, match=words):
        download("org/x", revision="v9")


def test_a_silent_hub_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(hub, "ANSWER_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert download("org/tiny", cache=cache).name == COMMIT
        with pytest.raises(InputError, match="the hub cannot be reached"):
            download("org/other", cache=cache)
        with pytest.raises(InputError, match="Timeout"):
            hub.list_files("org/other")
