"""`lockstep bench rl`: both sides of the price of exactness, and our side of a step beside a peer."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from lockstep.cli.bench_rl import RlBenchArgs, _model, _prompts
from lockstep.cli.engine_bench.process import Worker
from lockstep.cli.main import main
from lockstep.cli.rl_bench.ours import Plan

SMALL = ["--width", "32", "--layers", "1", "--groups", "2", "--group-size", "2", "--max-tokens", "4", "--threads", "1"]


def test_the_price_of_exactness_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    assert main(["bench", "rl", "--rounds", "2", "--prompt-words", "3", *SMALL, "--json", str(out)]) == 0
    assert "exact / PyTorch's" in capsys.readouterr().out
    figures = json.loads(out.read_text())["exactness"]
    assert [len(values) for values in figures["seconds"].values()] == [2, 2]
    assert main(["bench", "rl", "--rounds", "0"]) == 2


@pytest.mark.slow
def test_our_side_makes_a_step_when_asked(tmp_path: Path) -> None:
    wish = RlBenchArgs(width=32, layers=1, groups=4, group_size=4, max_tokens=6, rounds=2)
    prompts = _prompts(wish)
    _model(wish, prompts, tmp_path).write(tmp_path / "model", {}, "bench")
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    sizes = {"groups": 4, "group_size": 4, "max_tokens": 6, "threads": 1, "lr": 1e-4}
    plan = Plan(model=str(tmp_path / "model"), prompts=str(lines), **sizes)  # type: ignore[arg-type]
    with Worker("lockstep", [sys.executable, "-m", "lockstep.cli.rl_bench.ours"], 60, {}) as worker:
        worker.tell(asdict(plan))
        answers = [worker.ask("step") for _ in range(3)]
    assert all(0 < answer["tokens"] <= 96 and answer["step_s"] >= answer["rollout_s"] for answer in answers)
