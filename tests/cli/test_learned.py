"""What a run of a language model leaves to look at: samples, intervals, an evaluation."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from lockstep.cli.main import main
from lockstep.cli.train import columns
from lockstep.runs.console import ProgressDisplay
from lockstep.runs.jsonl import json_line
from tests.learn.conftest import write_rows
from tests.rl.lm.small import config, folder, run
from tests.runs.test_console import Terminal


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    directory = folder(root, config(run__total_steps=2))
    with directory:
        run(config(run__total_steps=2), directory)
    return directory.path


def show(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert main(["runs", "show", str(path), "--samples", *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_samples_are_shown_with_what_was_made_of_them(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = show(trained, capsys)
    assert [line.split()[:2] for line in lines if line.startswith("step")] == [["step", "1"], ["step", "2"]]
    assert "  say " in "\n".join(lines)
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert len(rows) == 8
    assert {row[3] for row in rows} <= {"0", "-"}
    assert [row[4] for row in rows] == ["0"] * 4 + ["1"] * 4


def test_samples_are_picked(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best, worst = (show(trained, capsys, "--pick", pick, "--num", "1") for pick in ("best", "worst"))
    rewards = [float(next(line for line in lines if line.strip()[:1].isdigit()).split()[1]) for lines in (best, worst)]
    assert rewards[0] > rewards[1]
    only = show(trained, capsys, "--step", "1", "--num", "20")
    assert [line.split()[1] for line in only if line.startswith("step")] == ["1"]
    assert main(["runs", "show", str(trained), "--samples", "--step", "7"]) == 2
    assert "steps 1 to 2" in capsys.readouterr().err
    assert main(["runs", "show", str(trained), "--samples", "--num", "0"]) == 2


def test_a_sample_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = folder(tmp_path, config())
    made.finish()
    assert main(["runs", "show", str(made.path), "--samples"]) == 2
    assert "no samples yet" in capsys.readouterr().err
    sample = {"step": 1, "problem": 3, "sample": 0, "prompt": "[bold]a\x1b[2J", "answer": "", "text": "\x07\n[red]x"}
    sample |= {"reward": None, "verdict": "timed_out", "detail": "1 s", "tokens": 2, "turns": 3, "truncated": True}
    made.samples_path.write_text(json_line(sample))
    text = "\n".join(show(made.path, capsys))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"\x07\n[red]x  1 s" in text
    assert "timed_out" in text
    assert "2+ in 3" in text
    made.samples_path.write_text(json_line({"step": 1}))
    assert main(["runs", "show", str(made.path), "--samples"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_eval_of_a_language_run(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert main(["eval", str(trained), "--problems", "5", "--samples", "2", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "greedy" in text
    assert "pass@2" in text
    figures = json.loads(out.read_text())
    assert len(figures["greedy"]["values"]) == 5
    assert figures["greedy"]["ci_low"] <= figures["greedy"]["mean"] <= figures["greedy"]["ci_high"]
    assert main(["eval", str(trained / "model"), "--problems", "5"]) == 2
    assert "does not name its task" in capsys.readouterr().err
    given = [
        "eval",
        str(trained / "model"),
        "--problems",
        "5",
        "--samples",
        "0",
        "--task-options",
        "everywhere",
        "False",
    ]
    assert main([*given, "--task", "tests.rl.lm.digits:Broken"]) == 0
    assert "digits, held out" in capsys.readouterr().out
    assert main(given) == 2
    assert "without --task" in capsys.readouterr().err


def test_a_supervised_run_is_drawn_by_its_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "say", "completion": "7"}])
    sizes = ["--model.width", "32", "--model.hidden", "32", "--model.num-layers", "1", "--model.num-heads", "1"]
    line = ["train", "sft-jsonl", "--data.path", path, "--out", str(tmp_path), "--run.total-steps", "11", *sizes]
    assert main([*line, "--model.vocab-size", "261", "--run.threads", "1", "--run.no-tensorboard", "--batch", "1"]) == 0
    assert "\nloss\n" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["eval", "serve", "generate", "chat"])
def test_a_run_that_has_not_ended_says_how_to_go_on(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = folder(tmp_path, config())
    made.finish()
    assert main([verb, str(made.path), *["hello"] * (verb == "generate")]) == 2
    assert f"go on with `lockstep train --resume {made.path}`" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "nowhere"), "--problems", "3"]) == 2
    assert "does not exist; expected a run directory" in capsys.readouterr().err


def test_the_live_table_keeps_its_rows_apart_and_within_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    line = {"reward": 0.5, "old_kl": 0.001, "entropy": 1.0, "rollout_tok_s": 3000.0, "rollout_s": 12.5}
    line |= {"learn_tok_s": 9000.0, "learn_s": 1.25, "publish_s": 0.01}
    for stream in (Terminal(), io.StringIO()):
        with ProgressDisplay(10, "name", columns=columns(config()), stream=stream, clock=lambda: 0.0) as display:
            display.update(3, line)
        text = stream.getvalue()
        assert "rollout tok/s 3,000" in text
        assert "held out" not in text
        if isinstance(stream, Terminal):
            assert max(len(row.strip()) for row in text.splitlines() if "\x1b" not in row) <= 80
            assert "\n         learn s 1.25" in text
