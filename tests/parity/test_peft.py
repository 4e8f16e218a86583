"""Adapters against PEFT: what it writes, we compute; what we write, it computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import ConfigError, FormatError, InputError
from lockstep.interop.hf.peft import load_adapter, save_adapter
from lockstep.models.adapter import LoraConfig, new_adapter


def peft() -> Any:
    """The package, imported by the first test that uses it: the other process of the suite never needs its seconds."""
    return pytest.importorskip("peft")


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]

GPT2 = {
    **{"hidden_size": ..., "intermediate_size": ..., "num_hidden_layers": ..., "num_attention_heads": ...},
    **{"num_key_value_heads": ..., "max_position_embeddings": ...},
    **{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "llama": (
        "Llama",
        {"attention_bias": True},
        {
            **{"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            **{"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
        },
    ),
    "gpt2": ("GPT2", GPT2, {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc", "attn.c_proj"]}),
}
TOKENS = torch.arange(2, 40)


def reference_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft(kind: str, pair_of: Callable[..., Any], tmp_path: Path) -> None:
    name, changes, lora = KINDS[kind]
    found = pair_of(name, **changes)
    torch.manual_seed(1)
    wrapped = peft().get_peft_model(found.reference, peft().LoraConfig(**lora, task_type="CAUSAL_LM"))
    try:
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0.0, 0.2)
        wrapped.save_pretrained(tmp_path / "theirs")
        expected = reference_logits(wrapped.eval())
    finally:
        wrapped.unload()
    model = found.ours()
    adapter = load_adapter(model, tmp_path / "theirs")
    batch = ForwardBatch.packed([TOKENS], adapter)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(batch, None)), expected, rtol=1e-4, atol=1e-4)
        difference = model.logits(model(batch.with_adapter(None), None)) - expected
    assert difference.abs().max() > 0.1
    # And back, by way of our writer.
    save_adapter(adapter, tmp_path / "ours", base="a/b")
    back = peft().PeftModel.from_pretrained(found.reference, tmp_path / "ours").eval()
    try:
        torch.testing.assert_close(reference_logits(back), expected)
    finally:
        back.unload()
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def full_disk(*args: object, **options: object) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_bad_folders_are_named(pair_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair_of("Qwen2").ours()
    good = tmp_path / "good"
    save_adapter(new_adapter(model, LoraConfig(rank=2)), good)
    save_adapter(new_adapter(model, LoraConfig(rank=3)), good)
    assert {pair.rank for pair in load_adapter(model, good)} == {3}
    adapter = new_adapter(model, LoraConfig(rank=2))
    with monkeypatch.context() as patch:
        patch.setattr("lockstep.interop.hf.peft.save_file", full_disk)
        with pytest.raises(ConfigError, match="No space left"):
            save_adapter(adapter, good)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good"]
    config = json.loads((good / "adapter_config.json").read_text())
    tensors = load_file(good / "adapter_model.safetensors")
    first = next(iter(tensors))

    def refused(match: str, *, config: Any = config, tensors: dict[str, Tensor] = tensors) -> None:
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(FormatError, match=match):
            load_adapter(model, folder)

    refused("use_dora", config={**config, "use_dora": True})
    refused("modules_to_save", config={**config, "modules_to_save": ["lm_head"]})
    refused("peft_type='IA3'", config={**config, "peft_type": "IA3"})
    refused("lora_alpha='a'", config={**config, "lora_alpha": "a"})
    refused("alpha_pattern", config={**config, "alpha_pattern": {"(a+)+$": 2}})
    refused("only lora_", tensors={key: value for key, value in tensors.items() if key != first})
    refused("no A or B", tensors={**tensors, "x.lora_magnitude_vector": torch.zeros(1)})
    refused("unknown matrix", tensors={**tensors, first.replace("layers.0", "layers.7"): tensors[first].clone()})
    refused("another model", tensors={**tensors, first: tensors[first][:, :5].contiguous()})
    refused("NaN", tensors={**tensors, first: tensors[first] * float("nan")})
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"\x09" * 40)
    with pytest.raises(FormatError, match="not a readable safetensors"):
        load_adapter(model, tmp_path / "bad")
    with pytest.raises(InputError, match="not a folder"):
        load_adapter(model, tmp_path / "nowhere")
