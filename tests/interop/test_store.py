"""The model store: pulled from here and from a hub on loopback, stopped and gone on with, listed, shown, removed."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep.cli.main import main
from lockstep.cli.model_words import names_language_model
from lockstep.cli.store_args import stored_path
from lockstep.core.errors import ConfigError, FormatError, InputError
from lockstep.interop import store as store_module
from lockstep.interop.hf.hub import list_files
from lockstep.interop.store import RECORD, ModelStore, describe
from tests.server.language.tiny import write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


class Hub:
    """What the hub's library asks of a hub. Of a file larger than `cut` two connections bring so many bytes, others none."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.cut, self.num_cut, self.ranges = files, 0, 0, list[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/org/tiny"):
                    siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
                    return self.answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
                name = path.rpartition("/")[2]
                if not path.startswith(f"/org/tiny/resolve/{COMMIT}/") or name not in hub.files:
                    return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
                data, headers = hub.files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
                first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
                if self.command == "GET" and first:
                    hub.ranges.append(f"{name}:{first}")
                    headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
                return self.answer(data[first:], 206 if first else 200, headers)

            def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    if 0 < hub.cut < len(body):
                        hub.num_cut, self.close_connection = hub.num_cut + 1, True
                        body = body[: hub.cut] if hub.num_cut <= 2 else b""
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    made = Hub({path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"no", "x.msgpack": b"no"})
    yield made
    made.close()


def test_a_local_model_by_its_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("LOCKSTEP_STORE", str(tmp_path / "store"))
    assert main(["list"]) == 0
    assert "no models in" in capsys.readouterr().out
    assert main(["show", "tiny"]) == 2
    assert "is empty" in capsys.readouterr().err
    assert main(["pull", str(folder)]) == 0
    assert main(["pull", str(folder), "--name", "org/tiny:q4"]) == 0
    capsys.readouterr()
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "org/tiny:q4", "tiny"]
    assert "safetensors" in lines[1]
    assert main(["show", "tiny"]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "template" not in line)
    assert (told["architecture"], told["context"], told["parameters"]) == ("LlamaForCausalLM", "1,024", "96,576")
    assert describe(ModelStore(tmp_path / "store").get("tiny"))["chat template"] == "yes"
    assert names_language_model("org/tiny:q4")
    assert names_language_model("tiny")
    assert main(["generate", "tiny", "hello", "--max-tokens", "3", "--kv-memory-mib", "4", "--seed", "1"]) == 0
    by_name = capsys.readouterr().out
    assert main(["generate", str(folder), "hello", "--max-tokens", "3", "--kv-memory-mib", "4", "--seed", "1"]) == 0
    assert capsys.readouterr().out == by_name
    assert main(["rm", "tinny"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    assert main(["convert", "tinny", str(tmp_path / "x.gguf")]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    assert main(["rm", "org/tiny:q4", "tinny"]) == 2
    assert main(["rm"]) == 2
    assert [model.name for model in ModelStore(tmp_path / "store").models()] == ["org/tiny:q4", "tiny"]
    assert main(["pull", str(folder), "--name", "other"]) == 0
    assert main(["rm", "tiny", "other", "tiny"]) == 0
    assert [model.name for model in ModelStore(tmp_path / "store").models()] == ["org/tiny:q4"]
    assert stored_path("tiny") == "tiny"
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["org--tiny++q4"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate", "org/tinny", "hello"], "'org/tiny'"),
        (["chat", "smal"], "'small'"),
        (["serve", "smal"], "'small'"),
        (["serve", "org/tyni", "--port", "0"], "'org/tiny'"),
        (["eval", "smalll"], "'small'"),
        (["eval", "nowhere/tiny", "--task", "spell_backward"], "'org/tiny'"),
        (["generate", "org/other", "hello"], ""),
    ],
)
def test_a_mistyped_name_is_told_the_near_ones(
    words: list[str],
    told: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreachable(*_: object, **__: object) -> Path:
        raise InputError("it is nowhere", field="model")

    monkeypatch.setenv("LOCKSTEP_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("lockstep.interop.hf.folder.download", unreachable)
    monkeypatch.setattr("lockstep.server.language_run.serve_language", unreachable)
    for name in ("org/tiny", "small"):
        ModelStore(tmp_path / "store").pull(str(folder), name=name)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert f"did you mean {told}, which" in err if told else "did you mean" not in err, err


def test_a_pull_from_the_hub(hub: Hub, folder: Path, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    seen: list[str] = []
    made = store.pull("org/tiny", endpoint=hub.url, progress=lambda file, done, size: seen.append(file))
    assert (made.name, made.revision, made.format) == ("org/tiny", COMMIT, "safetensors")
    names = {path.name for path in made.folder.iterdir()}
    assert names == {path.name for path in folder.iterdir()} | {"lockstep.json"}
    assert all((made.folder / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())
    assert set(seen) == names - {"lockstep.json"}
    assert store.get("org/tiny") == made
    with pytest.raises(InputError, match="neither a folder here nor a model on the hub"):
        store.pull("org/none", endpoint=hub.url)


def test_a_stopped_pull_goes_on(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelStore(tmp_path / "store")
    hub.cut = 60_000
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(InputError, match="could not be fetched"):
        store.pull("org/tiny", endpoint=hub.url)
    assert store.models() == []
    hub.cut, before = 0, len(hub.ranges)
    made = store.pull("org/tiny", endpoint=hub.url)
    assert hub.ranges[before:] == ["model.safetensors:100000"]
    assert (made.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_stopped_copy_goes_on_and_never_mixes_sources(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ModelStore(tmp_path / "store")
    monkeypatch.setattr(store_module, "_CHUNK", 50_000)

    def stop(file: str, done: int, size: int) -> None:
        if file == "model.safetensors" and done >= 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.pull(str(folder), progress=stop)
    assert store.models() == []
    (part,) = (tmp_path / "store").glob(".partial-*/*.part")
    assert part.stat().st_size == 100_000
    first: dict[str, int] = {}
    made = store.pull(str(folder), progress=lambda file, done, size: first.setdefault(file, done) and None)
    assert first["model.safetensors"] == 150_000
    assert (made.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    # What was left of one source is no beginning of another.
    other = shutil.copytree(folder, tmp_path / "other" / "tiny")
    (other / "model.safetensors").write_bytes(bytes(150_000) + (folder / "model.safetensors").read_bytes()[150_000:])
    with pytest.raises(KeyboardInterrupt):
        store.pull(str(folder), progress=stop)
    made = store.pull(str(other))
    assert (made.folder / "model.safetensors").read_bytes()[:10] == bytes(10)


def test_a_full_disk_and_a_read_only_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelStore(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(ConfigError, match=r"needs 0 MiB more .* has 0 MiB free"):
            store.pull(str(folder))
    with monkeypatch.context() as patch:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("os.fsync", full)
        with pytest.raises(ConfigError, match="is full; free some and pull again"):
            store.pull(str(folder))
    assert store.models() == []
    assert store.pull(str(folder)).name == "tiny"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write into the store"):
        ModelStore(tmp_path / "file").pull(str(folder))


def test_a_damaged_record_is_told_and_can_be_removed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "store"
    store = ModelStore(root)
    store.pull(str(folder))
    (store.pull(str(folder), name="bad").folder / RECORD).write_text("{}")
    assert main(["list", "--store", str(root)]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", "tiny"]
    assert "remove the model by `lockstep rm`" in err
    assert main(["show", "bad", "--store", str(root)]) == 2
    assert main(["rm", "bad", "--store", str(root)]) == 0
    assert [path.name for path in root.iterdir()] == ["tiny"]


def test_what_cannot_be_pulled(folder: Path, tmp_path: Path, hub: Hub) -> None:
    store = ModelStore(tmp_path / "store")
    with pytest.raises(InputError, match="neither here nor a hub id"):
        store.pull("a/b/c")
    with pytest.raises(InputError, match="cannot be a model's name"):
        store.pull(str(folder), name="../up")
    with pytest.raises(InputError, match="is no GGUF file"):
        store.pull(str(folder / "config.json"))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=f"{bare}: holds no weights"):
        store.pull(str(bare))
    assert not store.root.exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="holds 0 GGUF files"):
        store.pull(str(tmp_path / "empty"))
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a-q4_0.gguf", "a-q8_0.gguf"):
        (two / name).write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="choose one by --file"):
        store.pull(str(two))
    made = store.pull(str(two), file="*q8_0*")
    assert (made.format, made.path.name) == ("gguf", "a-q8_0.gguf")
    hub.files = {"a-q4_0.gguf": b"GGUF", "a-q8_0.gguf": b"GGUF", "config.json": b"{}"}
    with pytest.raises(InputError, match=r"2 GGUF files; choose one by --file: a-q4_0\.gguf, a-q8_0\.gguf"):
        list_files("org/tiny", endpoint=hub.url)
    assert list_files("org/tiny", file="*q4_0*", endpoint=hub.url) == (COMMIT, {"a-q4_0.gguf": 4})
    assert [path.name for path in (tmp_path / "store").iterdir() if path.name[0] != "."] == ["two"]
