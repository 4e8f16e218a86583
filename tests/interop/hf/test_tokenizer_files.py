"""Tokenizers and models of GGUF files as folders: `transformers` is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.interop.alike import compare_ids, compare_logits, logits_of
from lockstep.interop.convert import convert
from lockstep.interop.gguf.vocabulary import vocabulary_fields
from lockstep.interop.hf.tokenizer_files import write_tokenizer
from lockstep.interop.weights import open_weights
from lockstep.tokenize.chat import ChatTemplate
from lockstep.tokenize.tokenizer import Tokenizer
from tests.server.language.tiny import write_model
from tests.tokenize.vocabularies import load, read_metadata, read_vectors

pytestmark = pytest.mark.slow
# The larger vocabularies take this way in tests/reference.
NAMES = {"gpt-2": "gpt-2", "deepseek-coder": "deepseek-coder", "llama-spm": "default", "phi-3": "default"}


@pytest.mark.parametrize("name", NAMES)
def test_real_vocabularies(name: str, tmp_path: Path) -> None:
    """File to folder, as `transformers` reads it, and back to a file's metadata."""
    transformers = pytest.importorskip("transformers")
    metadata = read_metadata(name)
    write_tokenizer(tmp_path, metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, folder = load(name), Tokenizer.from_folder(tmp_path)
    assert compare_ids(ours, folder) > 60
    for text, ids in read_vectors(name):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert folder.encode(text, add_special=False, parse_special=True) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs("Hello there")["input_ids"] == ours.encode("Hello there", add_special=True, parse_special=True)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_ids[0])
    fields = vocabulary_fields(tmp_path, ours.vocab_size).fields
    assert fields["tokenizer.ggml.pre"] == NAMES[name]
    again = Tokenizer.from_gguf_metadata({"general.name": metadata.get("general.name", ""), **fields})
    assert compare_ids(ours, again, special=name != "phi-3") > 60


def test_transformers_runs_what_was_converted(tmp_path: Path) -> None:
    """A quantised file as a folder: ids, chat, logits and greedy tokens there are those of the file here."""
    transformers: Any = pytest.importorskip("transformers")
    source = write_model(tmp_path / "source")
    convert(open_weights(source), tmp_path / "x.gguf", format="q8_0")
    made = convert(open_weights(tmp_path / "x.gguf"), tmp_path / "folder")
    assert made.logits is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", attn_implementation="eager").eval()
    assert model.dtype == torch.float32
    ours = Tokenizer.from_folder(source)
    messages = [{"role": "user", "content": "hello the world"}]
    text = ChatTemplate.of(ours).render(messages)
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == text
    assert chat == ours.encode(text, add_special=False, parse_special=True)
    assert model.generation_config.eos_token_id == list(ours.eos_ids)
    with torch.no_grad():
        theirs = model(torch.tensor([chat])).logits[0]
    assert compare_logits(logits_of(open_weights(tmp_path / "folder"), chat, "fp32"), theirs).largest < 1e-4
