"""`lockstep convert`: the same model in another form, checked before it appears; nothing is lost when that fails."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.cli.main import main
from lockstep.core.errors import ConfigError, ExportError
from lockstep.interop import alike, convert
from lockstep.interop.gguf import GGUFSource, save_gguf
from lockstep.interop.gguf.mixtures import Mixture, fitting
from lockstep.interop.hf import HFFolder
from lockstep.interop.hf.save import save_folder
from lockstep.interop.weights import open_weights
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.vocabulary import Kind
from tests.server.language.tiny import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_model(tmp_path_factory.mktemp("convert") / "tiny")
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": [265, 257], "temperature": 0.5}))
    return made


def told(capsys: pytest.CaptureFixture[str], *args: object, status: int = 0) -> str:
    assert main(["convert", *map(str, args), "--num-threads", "1"]) == status
    shown = capsys.readouterr()
    return shown.err if status else shown.out


def test_there_and_back_nothing_is_lost(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, folder, tmp_path / "a.gguf", "--name", "mine")
    assert "tensors 21 x F32" in said
    assert "100% of" in said
    assert "equal for" in said
    assert "64 of 64 places, largest relative difference 0.0e+00" in said
    source = GGUFSource.open(tmp_path / "a.gguf")
    assert source.file.value("general.name") == "mine"
    assert source.generation_config() == {"eos_token_id": [265, 257], "temperature": 0.5}
    told(capsys, tmp_path / "a.gguf", tmp_path / "back")
    before, after = HFFolder.open(folder), HFFolder.open(tmp_path / "back")
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names())
    assert after.generation_config() == {"eos_token_id": [265, 257, 266], "temperature": 0.5, "do_sample": True}
    one, two = Tokenizer.from_folder(folder), Tokenizer.from_folder(tmp_path / "back")
    assert (one.eos_ids, one.chat_templates) == (two.eos_ids, two.chat_templates)
    # The folder of bfloat16, and what its file gives back: norms are float32 only in the file.
    told(capsys, folder, tmp_path / "half", "--format", "bf16")
    told(capsys, tmp_path / "half", tmp_path / "half.gguf")
    told(capsys, tmp_path / "half.gguf", tmp_path / "again")
    half, again = HFFolder.open(tmp_path / "half"), HFFolder.open(tmp_path / "again")
    assert again.config()["torch_dtype"] == "bfloat16"
    assert all(torch.equal(half.tensor(name), again.tensor(name)) for name in half.names())
    assert {again.tensor(name).dtype for name in again.names()} == {torch.bfloat16}


def test_quantised(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, folder, tmp_path / "q8.gguf", "--format", "Q8_0")
    assert "tensors 16 x Q8_0, 5 x F32" in said
    assert " KL " in said
    made = convert.convert(open_weights(folder), tmp_path / "q4.gguf", format="q4_k_m")
    # Rows of 64 are no blocks of 256: as llama-quantize falls back.
    assert made.kinds == {"Q5_0": 13, "F32": 5, "Q8_0": 3}
    assert made.logits is not None
    assert 0 < made.logits.kl_mean < 10
    assert "loses twice" in told(capsys, tmp_path / "q8.gguf", tmp_path / "b.gguf", "--format", "q4_0", status=2)
    assert "Q4_0" in told(
        capsys, tmp_path / "q8.gguf", tmp_path / "b.gguf", "--format", "q4_0", "--requantise", "--pure"
    )
    # Blocks stay what they are where they are of the format, and become float32 in a folder.
    same = convert.convert(open_weights(tmp_path / "q8.gguf"), tmp_path / "c.gguf")
    unpacked = convert.convert(open_weights(tmp_path / "q8.gguf"), tmp_path / "unpacked")
    for made in (same, unpacked):
        assert made.logits is not None
        assert made.logits.largest == 0.0
    one, two = GGUFSource.open(tmp_path / "q8.gguf"), GGUFSource.open(tmp_path / "c.gguf")
    for name in one.names():
        assert torch.equal(one.tensor(name), two.tensor(name))
        assert torch.equal(one.tensor(name), HFFolder.open(tmp_path / "unpacked").tensor(name))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["there.gguf"], "is there already"),
        (["new.gguf", "--format", "bf61"], "did you mean 'bf16'"),
        (["new", "--format", "q4_0"], "a format of GGUF files"),
        (["full", "--overwrite"], r"holds more than a model (notes.txt)"),
        (["folder.gguf"], "is a folder"),
        (["full/notes.txt/x.gguf"], "cannot write"),
    ],
)
def test_wrong_wishes_lose_nothing(
    args: list[str], words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "there.gguf").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert words in told(capsys, folder, tmp_path / args[0], *args[1:], "--no-check", status=2)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.gguf").read_text() == (tmp_path / "full" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("out", ["x.gguf", "x"])
@pytest.mark.parametrize("format", ["bf16", "q8_0", "q4_0"])
def test_float32_of_smaller_numbers_is_the_same_model(format: str, out: str, folder: Path, tmp_path: Path) -> None:
    small = tmp_path / ("small" if format == "bf16" else "small.gguf")
    convert.convert(open_weights(folder), small, format=format, check=False)
    made = convert.convert(open_weights(small), tmp_path / out, format="f32")
    assert made.logits is not None
    assert made.logits.largest < alike.SAME
    assert list(made.kinds) in (["F32"], ["float32"])


def test_norms_that_a_folder_of_halves_rounds(folder: Path, tmp_path: Path) -> None:
    source = open_weights(folder)
    draw = torch.Generator().manual_seed(0)
    tensors = {name: source.tensor(name) for name in source.names()}
    tensors = {name: x if x.dim() > 1 else x + torch.rand(x.shape, generator=draw) for name, x in tensors.items()}
    save_folder(tmp_path / "noisy", source.config(), tensors, tokenizer_from=folder)
    # Matrices of float16, norms of float32: the usual layout of a file.
    convert.convert(open_weights(tmp_path / "noisy"), tmp_path / "half.gguf", format="f16", check=False)
    made = convert.convert(open_weights(tmp_path / "half.gguf"), tmp_path / "half", format="f16")
    assert made.kinds == {"float16": 21}
    assert made.logits is not None
    assert made.logits.largest > alike.SAME


def test_line_ends_of_a_chat_template_stay(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": "a\r\nb"}))
    convert.convert(open_weights(source), tmp_path / "x.gguf", check=False)
    assert convert.convert(open_weights(tmp_path / "x.gguf"), tmp_path / "back").num_texts
    assert Tokenizer.from_folder(tmp_path / "back").chat_templates == {"default": "a\r\nb"}


def test_a_name_that_changes_ids_is_refused(folder: Path, tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<|user|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += list("abcdefghijkl")
    kinds = [Kind.UNKNOWN, *[Kind.CONTROL] * 3, *[Kind.BYTE] * 256, *[Kind.NORMAL] * 12]
    words = {"model": "llama", "tokens": tokens, "token_type": list(map(int, kinds)), "scores": [0.0] * 272}
    fields = {f"tokenizer.ggml.{key}": value for key, value in words.items()}
    save_gguf(tmp_path / "a.gguf", open_weights(folder), tokenizer=fields, name="Phi-3 mini")
    with pytest.raises(ConfigError, match=r"would change ids.* with phi-3"):
        convert.convert(open_weights(tmp_path / "a.gguf"), tmp_path / "b.gguf", name="other")
    assert convert.convert(open_weights(tmp_path / "a.gguf"), tmp_path / "b.gguf", name="my phi-3").num_texts


def test_the_folder_one_is_in(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (Path(), tmp_path):
        with pytest.raises(ConfigError, match="the folder you are in"):
            convert.convert(open_weights(folder), name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["x.gguf", "x"])
def test_what_differs_is_never_there(out: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that changed, ids that changed and a disk that is full; an earlier output stays."""
    convert.convert(open_weights(folder), tmp_path / out, check=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fails(error: type, words: str, target: object, name: str, value: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises(error, match=words):
                convert.convert(open_weights(folder), tmp_path / out, overwrite=True)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    read, encode = alike.logits_of, Tokenizer.encode_batch
    calls: Counter[str] = Counter()

    def drifting(*args: Any) -> torch.Tensor:
        calls["logits"] += 1
        return read(*args) + 0.01 * calls["logits"] * torch.arange(272)

    def other_ids(self: Tokenizer, texts: list[str], **options: Any) -> list[list[int]]:
        calls["ids"] += 1
        return [[*row, calls["ids"]] for row in encode(self, texts, **options)]

    fails(ExportError, "logits of what was written", alike, "logits_of", drifting)
    fails(ExportError, "nothing was written", Tokenizer, "encode_batch", other_ids)
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    fails(ConfigError, "MiB free", shutil, "disk_usage", lambda path: small)
    made = convert.convert(open_weights(folder), tmp_path / out, overwrite=True)
    assert made.num_texts is not None


def test_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, bare)
    made = convert.convert(open_weights(bare), tmp_path / "x.gguf")
    assert made.num_texts is None
    assert "no tokenizer.json" in made.notes[0]
    (bare / "tokenizer.model").write_bytes(b"words")
    copied = convert.convert(open_weights(bare), tmp_path / "copied")
    assert copied.notes == ["there is no tokenizer.json, so ids were not compared"]
    assert (tmp_path / "copied" / "tokenizer.model").read_bytes() == b"words"
    again = convert.convert(open_weights(tmp_path / "x.gguf"), tmp_path / "back")
    assert again.logits is not None
    assert "no tokenizer" in again.notes[0]


def test_what_a_file_says_of_its_model_stays(folder: Path, tmp_path: Path) -> None:
    about = {"general.author": "somebody", "general.tags": ["a", "b"]}
    save_gguf(tmp_path / "a.gguf", open_weights(folder), "F16", about=about)
    convert.convert(open_weights(tmp_path / "a.gguf"), tmp_path / "b.gguf", format="q8_0", name="b")
    file = GGUFSource.open(tmp_path / "b.gguf").file
    assert {key: file.value(key) for key in about} == about
    assert (file.value("general.name"), file.value("general.file_type")) == ("b", 7)
    # Of an architecture that is not run here the logits cannot be compared, and that is said.
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "architectures": ["OtherForCausalLM"]}))
    made = convert.convert(open_weights(tmp_path / "other"), tmp_path / "c.gguf")
    assert made.logits is None
    assert "cannot be run here" in made.notes[0]


def test_a_language_model_is_no_policy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder)]) == 2
    assert "lockstep convert" in capsys.readouterr().err


def kinds(name: str, num_layers: int = 16, **changes: Any) -> dict[str, int]:
    config = {"num_hidden_layers": num_layers, "num_attention_heads": 8, "num_key_value_heads": 2, **changes}
    mixture = Mixture.of(name, "llama", config, tied=False)
    shape = (256, 256)
    names = [f"blk.{layer}.{part}.weight" for layer in range(num_layers) for part in ("attn_v", "ffn_down", "attn_q")]
    return dict(Counter(mixture.kind(part, shape) for part in [*names, "output.weight", "token_embd.weight"]))


def test_mixtures() -> None:
    """Counts that llama-quantize gives for such a model (tests/reference compares tensor by tensor)."""
    assert kinds("Q4_K_M") == {"Q6_K": 17, "Q4_K": 33}
    assert kinds("Q4_K_S") == {"Q5_K": 6, "Q4_K": 43, "Q6_K": 1}
    assert kinds("Q5_K_M") == {"Q6_K": 17, "Q5_K": 33}
    assert kinds("Q4_0") == {"Q4_0": 49, "Q6_K": 1}
    assert kinds("Q8_0") == {"Q8_0": 50}
    assert kinds("IQ4_NL") == {"Q5_K": 18, "IQ4_NL": 31, "Q6_K": 1}
    assert kinds("MXFP4_MOE") == {"Q8_0": 50}
    assert kinds("Q4_K_S", num_local_experts=8)["Q8_0"] == 16
    assert kinds("Q4_K_S", num_layers=80)["Q5_K"] == 80 + 10
    assert [fitting(kind, 96) for kind in ("Q4_K", "Q5_K", "Q6_K", "Q8_0")] == ["Q5_0", "Q5_1", "Q8_0", "Q8_0"]
    assert fitting("Q6_K", 50) == fitting("MXFP4", 50) == "F16"
