"""The command line as a user types it, wrong input included."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.cli.main import VERBS, main

TINY = ["--run.total-steps", "512", "--run.final-episodes", "2", "--run.log-every", "256"]


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "ppo-cartpol"], "did you mean 'ppo-cartpole'"),
        (["train", "--lst"], "did you mean '--list'"),
        (["train", "ppo-cartpole", "--env.id", "CartPol-v1"], "CartPole-v1"),
        (["train", "ppo-cartpole", "--env.id", "nowhere.module:Thing"], "nowhere"),
        (["train", "ppo-cartpole", "--gamma", "1.5"], "gamma=1.5"),
        (["train", "ppo-cartpole", "--run.total-steps", "0"], "total_steps=0"),
        (["train", "--resume", "no-such-run"], "not a run directory"),
        (["eval", "no-such-run"], "does not exist; expected a run directory"),
        (["bench", "contrl"], "did you mean 'control'"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_full_disk_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error.add_note("go on with: lockstep train --resume RUN")
        raise error

    monkeypatch.setattr("lockstep.cli.train.main", fail)
    assert main(["train", "ppo-cartpole"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("lockstep train:")
    assert "No space left" in told[0]
    assert told[1:] == ["go on with: lockstep train --resume RUN"]


def test_a_verb_of_other_programs_is_told_its_name_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "model"]) == 2
    assert "did you mean 'chat'?" in capsys.readouterr().err
    assert main(["serve"]) == 2
    assert "or a language model" in capsys.readouterr().err


def test_unknown_option_suggests_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "ppo-cartpole", "--run.totl-steps", "5"])
    assert stop.value.code == 2
    assert "--run.total-steps" in capsys.readouterr().err


def test_train_eval_resume_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "ppo-cartpole", *TINY, "--name", "first"]) == 0
    run = next((tmp_path / "runs").iterdir())
    assert str(run.name) in capsys.readouterr().out
    for name in ("config.json", "versions.json", "metrics.jsonl", "eval.jsonl", "run.json", "policy/model.safetensors"):
        assert (run / name).exists(), name
    assert list((run / "tensorboard").iterdir())
    assert main(["eval", str(run), "--episodes", "3", "--json", "eval.json"]) == 0
    assert len(json.loads(Path("eval.json").read_text())["returns"]) == 3
    assert main(["eval", str(run), "--episodes", "1", "--json", "nowhere/eval.json"]) == 2
    assert "nowhere/eval.json" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"{run.name} is finished: 512 steps done; evaluation at step 512: mean return" in out
    assert "%" not in out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(["runs", "list"]) == 0
    assert "first" in capsys.readouterr().out


def test_steps_are_rounded_up_to_whole_rollouts_and_progress_ends_at_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """500 steps of ppo-cartpole are 2 rollouts of 32 x 8."""
    tiny = ["--run.total-steps", "500", "--run.final-episodes", "2", "--run.log-every", "100000"]
    assert main(["train", "ppo-cartpole", *tiny, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "ppo-cartpole: 100% | 512/500 |" in out
    assert "steps            512 in" in out


def test_import_is_cheap() -> None:
    """`import lockstep` imports one module of its own and a handful of Python's. Modules are counted, not
    milliseconds, which depend on the machine."""
    code = "import sys; before = set(sys.modules); import lockstep; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = run.stdout.split()
    assert [name for name in modules if name.split(".")[0] not in sys.stdlib_module_names] == ["lockstep"]
    assert len(modules) < 30
