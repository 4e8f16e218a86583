"""`lockstep bench engine`: tiny models, and for the peer a script that answers as the real workers do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.cli import bench_engine
from lockstep.cli.engine_bench import models, tables
from lockstep.cli.engine_bench.process import Worker
from lockstep.cli.main import main
from lockstep.core.errors import ConfigError, DeadlineError
from lockstep.interop.weights import open_weights
from lockstep.kernels import native
from lockstep.models.families import load_model

needs_library = pytest.mark.skipif(native.state.library is None, reason="no compiled kernels")

TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
PEER = """
import json, sys
for line in sys.stdin:
    ask = json.loads(line)
    texts = [[0]] * len(ask.get("prompts", []))
    print(json.dumps({"seconds": 100.0, "version": "0", "texts": texts, "cached": 0}), flush=True)
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(models.PUBLISHED, "tiny", TINY)
    monkeypatch.setattr(
        bench_engine,
        "machine_limits",
        lambda threads: {"read_gb_s": 10.0, "fp32": 100.0, "int8": 0.0, "int4": 0.0, "bf16": 0.0},
    )
    monkeypatch.setattr(
        bench_engine, "random_prompt", lambda draw, num: [draw.randrange(1, 500) for _ in range(min(num, 40))]
    )
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    monkeypatch.setattr(
        bench_engine, "peer_worker", lambda wish, name: Worker(wish.peer, [sys.executable, str(script)], 60.0, {})
    )
    return tmp_path


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "kind", "figure"), [("llama.cpp", "q4_0", "prefill"), ("vllm", "bf16", "shared")], ids=["llama", "vllm"]
)
def test_a_run(tiny: Path, capsys: pytest.CaptureFixture[str], peer: str, kind: str, figure: str) -> None:
    path = tiny / "figures.json"
    options = [
        "--peer",
        peer,
        "--model",
        "tiny",
        "--cases",
        figure,
        "--formats",
        kind,
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    assert main(["bench", "engine", *options, "--models", str(tiny), "--json", str(path)]) == 0
    found = json.loads(path.read_text())["formats"][kind][figure]
    assert found["ratio"] > 1.0
    if peer == "vllm":
        assert found["equal_to_cold"]["ours"] == found["num_texts"] == 32
        assert found["tokens"]["ours"]["cached"] > 0
    assert f"{found['target']}x" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["q4_0", "bf16"])
def test_files_hold_the_model(tiny: Path, kind: str) -> None:
    path = tiny / "model.gguf"
    models.write_gguf_model("tiny", kind, path)
    model = load_model(open_weights(path))
    assert model.vocab_size == 512
    assert model.tied
    counts = models.weight_counts("tiny")
    assert counts["weights"] - counts["layer_weights"] == 512 * 64


def test_int8_folder_is_what_vllm_reads(tiny: Path) -> None:
    folder = tiny / "int8"
    models.write_folder_model("tiny", "int8", folder)
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert tensors[name].dtype == torch.int8
    assert tensors[f"{name}_scale"].shape == (96, 1)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert groups["group_0"]["weights"]["strategy"] == "channel"


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--formats", "int8"]) == 2
    assert "unknown format beside llama.cpp 'int8'" in capsys.readouterr().err
    assert main(["bench", "engine", "--model", "Qwen9"]) == 2
    assert main(["bench", "engine", "--rounds", "0"]) == 2


def test_a_worker_that_fails_says_why() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with Worker("x", command, 60.0, {}) as worker, pytest.raises(ConfigError, match="no such model"):
        worker.ask("load")


def test_a_worker_has_a_deadline() -> None:
    command = [sys.executable, "-c", "input(); import time; time.sleep(60)"]
    with Worker("x", command, 0.2, {}) as worker, pytest.raises(DeadlineError, match="no answer to 'load'"):
        worker.ask("load")


def test_start_table() -> None:
    start = {"seconds": [1.0, 3.0, 2.0], "cpu": [1.5], "resident": [1e9], "peak": [2e9]}
    figures: dict[str, Any] = {
        "peer": "llama.cpp",
        "model": "m",
        "threads": 2,
        "formats": {"q4_0": {"start": {"ours": start}}},
    }
    (table,) = tables.tables(figures)
    assert list(table.columns[2].cells) == ["2.00 (1.00 - 3.00)"]


def test_a_peer_need_not_answer_alone() -> None:
    command = [sys.executable, "-c", PEER]
    with Worker("ours", command, 60.0, {}) as ours, Worker("vllm", command, 60.0, {}) as peer:
        rates, texts = bench_engine.generated({"ours": ours, "vllm": peer}, [[1], [2]], 4, rounds=1)
        compared = bench_engine.compared_with_cold({"ours": ours}, texts, [[1], [2]], 4)
    assert compared == {"equal_to_cold": {"ours": 2, "vllm": None}, "num_texts": 2}
    rates["tokens"] = {"ours": {"computed": 2, "cached": 0}}
    formats = {"int8": {"shared": {**rates, **compared}}}
    (table,) = tables.tables({"peer": "vllm", "model": "m", "threads": 1, "formats": formats})
    assert list(table.columns[-1].cells) == ["ours 2/2, vllm not compared"]
