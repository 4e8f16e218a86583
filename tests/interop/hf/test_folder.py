"""Folders as they should be, and every way in which they are not."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lockstep.core.errors import ConfigError, FormatError, InputError
from lockstep.core.tensors import check_tensors
from lockstep.interop.hf import HFFolder, save_folder

CONFIG = {"model_type": "llama", "hidden_size": 8}
TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).reshape(3, 8),
    "b.weight": torch.ones(4, 4, dtype=torch.bfloat16),
    "c.bias": torch.zeros(5, dtype=torch.float16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_folder(tmp_path / "m", CONFIG, TENSORS)
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_folder(tmp_path / "s", CONFIG, TENSORS, max_shard_bytes=100)
    return tmp_path / "s"


def test_single_file(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    source = HFFolder.open(folder)
    assert source.config() == CONFIG
    assert source.generation_config() == {}
    assert source.tokenizer() == folder
    assert sorted(source.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(source.tensor(name), tensor)
        assert source.tensor(name).dtype == tensor.dtype
        assert source.shape(name) == tuple(tensor.shape)
        assert source.quantised(name) is None
    with pytest.raises(InputError, match=r"did you mean 'a\.weight'"):
        source.tensor("a.weigth")
    check_tensors(source, {name: tuple(tensor.shape) for name, tensor in TENSORS.items()})


def test_shards(sharded: Path) -> None:
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 96 + 32 + 10
    assert index["weight_map"]["a.weight"] == names[0]
    source = HFFolder.open(sharded)
    for name, tensor in TENSORS.items():
        assert torch.equal(source.tensor(name), tensor)


def test_weights_that_do_not_fit_the_model(folder: Path) -> None:
    expected = {"a.weight": (3, 9), "b.weight": (4, 4), "d.weight": (2,)}
    with pytest.raises(FormatError) as caught:
        check_tensors(HFFolder.open(folder), expected, where="m")
    words = str(caught.value)
    assert words.startswith("m: ")
    for part in ("1 missing: d.weight", "1 not expected: c.bias", "a.weight [3, 8] instead of [3, 9]"):
        assert part in words


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


def test_broken_indexes(sharded: Path) -> None:
    first, second = sorted(path.name for path in sharded.glob("*.safetensors"))
    edit_index(sharded, **{"ghost.weight": first})
    with pytest.raises(FormatError, match=rf"places tensor 'ghost.weight' in {first}, which does not have it"):
        HFFolder.open(sharded)
    edit_index(sharded, **{"ghost.weight": "../../secret.safetensors"})
    with pytest.raises(FormatError, match=r"expected a \.safetensors file beside it"):
        HFFolder.open(sharded)
    edit_index(sharded, **{"ghost.weight": 7})
    with pytest.raises(FormatError, match="ghost"):
        HFFolder.open(sharded)
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": first}}))
    (sharded / second).unlink()
    save_file({"a.weight": torch.ones(1), "stray": torch.ones(1)}, sharded / first)
    with pytest.raises(FormatError, match=f"does not place tensor 'stray', which {first} has"):
        HFFolder.open(sharded)
    for text, words in (("{}", "no weight_map"), ("[]", "holds a list"), ("{", "not JSON"), ("[" * 10**6, "not JSON")):
        index.write_text(text)
        with pytest.raises(FormatError, match=words):
            HFFolder.open(sharded)


def test_missing_and_damaged_shards(sharded: Path) -> None:
    second = sharded / "model-00002-of-00002.safetensors"
    data = second.read_bytes()
    second.unlink()
    with pytest.raises(FormatError, match=r"shards that are not there: model-00002-of-00002\.safetensors"):
        HFFolder.open(sharded)
    header = struct.unpack("<Q", data[:8])[0]
    hostile = {
        "truncated": data[:-3],
        "header cut": data[:40],
        "header length lies": struct.pack("<Q", 1 << 60) + data[8:],
        "header a little longer": struct.pack("<Q", header + 8) + data[8:],
        "empty": b"",
        "not json": data[:8] + b"x" * header + data[8 + header :],
        "bytes after the end": data + b"123",
        "a page of html": b"<html>" * 100,
    }
    for content in hostile.values():
        second.write_bytes(content)
        with pytest.raises(FormatError, match=r"model-00002-of-00002\.safetensors: is not a readable"):
            HFFolder.open(sharded)


def header_file(path: Path, entry: dict, num_bytes: int = 16) -> None:
    text = json.dumps({"t": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 60]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]},
        {"shape": [4]},
    ],
)
def test_hostile_headers(entry: dict, folder: Path) -> None:
    header_file(folder / "model.safetensors", entry)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        HFFolder.open(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[1]", "holds a list"),
        ('{"a": 1}', "no model_type"),
        ('{"model_type": 3}', "no model_type"),
        ("\x80", "JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', "quantised with 'awq'"),
    ],
)
def test_broken_configs(text: str, words: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=words):
        HFFolder.open(folder)


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        HFFolder.open(folder / "config.json")
    with pytest.raises(InputError, match="does not exist"):
        HFFolder.open("./no/such/folder")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"neither model\.safetensors nor .* it holds \['config\.json'\]"):
        HFFolder.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json: cannot be read"):
        HFFolder.open(folder)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def test_pickles(folder: Path) -> None:
    """Plain tensors are read; anything that would run code is refused and not run."""
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(TENSORS, path)
    source = HFFolder.open(folder)
    for name, tensor in TENSORS.items():
        assert torch.equal(source.tensor(name), tensor)
    marker = folder / "ran"
    torch.save({"t": TENSORS["a.weight"], "bomb": Bomb(marker)}, path)
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: is not a plain pickle"):
        HFFolder.open(folder)
    with path.open("wb") as file:
        pickle.dump(Bomb(marker), file)
    with pytest.raises(FormatError, match="not a plain pickle"):
        HFFolder.open(folder)
    assert not marker.exists()
    torch.save([1, 2], path)
    with pytest.raises(FormatError, match="dict of tensors"):
        HFFolder.open(folder)
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(FormatError, match="not a plain pickle"):
        HFFolder.open(folder)


def test_saving_is_all_or_nothing(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="is there already"):
        save_folder(folder, CONFIG, TENSORS)

    def breaks() -> object:
        yield "a", torch.zeros(3)
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        save_folder(folder, CONFIG, breaks(), overwrite=True)  # type: ignore[arg-type]
    for tensors, words in (([], "no tensors"), ([("a", torch.zeros(1))] * 2, "given twice")):
        with pytest.raises(InputError, match=words):
            save_folder(folder, CONFIG, tensors, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]
    save_folder(folder, CONFIG, {"new": torch.ones(2)}, overwrite=True)
    assert HFFolder.open(folder).names() == ["new"]
    assert list(folder.parent.iterdir()) == [folder]


def test_tensors_that_share_memory_or_lie_oddly(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {"whole": base, "tied": base, "row": base[1], "turned": base.t(), "scalar": torch.tensor(3.0)}
    save_folder(tmp_path / "m", CONFIG, tensors, generation_config={"top_k": 3})
    source = HFFolder.open(tmp_path / "m")
    for name, tensor in tensors.items():
        assert torch.equal(source.tensor(name), tensor)
    assert source.generation_config() == {"top_k": 3}


def test_tokenizer_files_go_along(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not copied")
    save_folder(tmp_path / "n", CONFIG, TENSORS, tokenizer_from=folder)
    assert sorted(path.name for path in (tmp_path / "n").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.slow
def test_transformers_reads_our_shards_and_we_its(tmp_path: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=100,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    save_folder(tmp_path / "ours", model.config.to_dict(), model.state_dict(), max_shard_bytes=60_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    theirs = HFFolder.open(tmp_path / "theirs")
    assert sorted(theirs.names()) == sorted(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(theirs.tensor(name), tensor)
