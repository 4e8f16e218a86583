"""`lockstep runs`: tables that tell the truth, damage included."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lockstep.cli.main import main
from lockstep.runs.directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class Env:
    id: str = "CartPole-v1"


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 0.1
    env: Env = Env()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, lr in (("ppo", 0.1), ("dqn", 0.2)):
        for seed in range(3):
            with RunDirectory.create(tmp_path, name, Config(lr), seed) as run:
                sink = run.sink(tensorboard=False)
                for step in range(0, 1001, 100):
                    sink.log(step, {"return": step * lr, "train_s": step / 500})
                sink.close()
                run.log_eval(500, [1.0, 2.0])
                run.log_eval(1000, [100 * lr + seed, 100 * lr + seed + 2])
    (tmp_path / "broken").mkdir()
    return tmp_path


@pytest.mark.parametrize("option", [["--root"], []])
def test_list(option: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list", *option, str(root)]) == 0
    rows = capsys.readouterr().out.splitlines()
    row = next(row for row in rows if row.startswith("ppo-s1-"))
    assert row.split()[1:5] == ["ppo", "CartPole-v1", "1", "finished"]
    assert "1,000" in row
    assert "12.0 [-0.7, 24.7]" in row
    assert row.split()[-1] == "500"
    assert any(row.startswith("broken") and "damaged" in row for row in rows)
    assert any("broken/config.json is missing" in row for row in rows)


def test_list_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list", "--root", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out
    assert main(["runs", "list", "--root", str(tmp_path / "absent")]) == 2
    assert "train first" in capsys.readouterr().err
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out.replace("\n", "")
    assert main(["runs", "list", str(tmp_path / "absent")]) == 2


def test_show(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "show", "dqn-s2", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    for part in ("finished", "dqn, seed 2", "env.id", "23.0 [10.3, 35.7]", "newest metrics", "*"):
        assert part in out
    assert main(["runs", "show", "dqn", "--root", str(root)]) == 2
    assert "several runs" in capsys.readouterr().err
    assert main(["runs", "show", str(root / "broken"), "--root", str(root)]) == 2


def test_compare(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [path.name for path in sorted(root.glob("*-s*"))]
    assert main(["runs", "compare", *names, "--root", str(root)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert ["lr", "0.2", "0.1"] in [row.split() for row in out]
    assert not any(row.startswith("env.id") for row in out)
    ppo = next(row for row in out if row.split()[1:3] == ["ppo", "3"])
    assert "12.0 [11.0, 13.0]" in ppo
    assert "0.00 [0.00, 0.00]" in ppo
    assert main(["runs", "compare", "--root", str(root)]) == 2
    capsys.readouterr()
    assert main(["runs", "compare", *(str(root / name) for name in names)]) == 0
    assert capsys.readouterr().out.splitlines() == out


def test_plot(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [path.name for path in sorted(root.glob("*-s*"))]
    for metric in ("return", "eval"):
        out = root / "plots" / f"{metric}.png"
        assert main(["runs", "plot", *names, "--root", str(root), "--out", str(out), "--metric", metric]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
    assert main(["runs", "plot", names[0], "--root", str(root), "--metric", "retrun"]) == 2
    assert "did you mean 'return'" in capsys.readouterr().err
