"""Tasks from files and values: good lines become problems, bad ones are named, programs are judged in a locked room."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lockstep.core.errors import ConfigError, FormatError
from lockstep.core.trajectory import Verdict
from lockstep.envs.lm.code import CodeConfig, CodeTask
from lockstep.envs.lm.records import RecordsConfig, RecordsTask, Sample
from lockstep.envs.lm.sandbox import SandboxConfig, run_program
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool

GSM = [
    {"question": "Six times seven?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
    {"question": "Half of a pie?", "answer": "#### 1/2"},
    {"question": "A thousand?", "answer": "#### 1,000"},
]


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def test_gsm8k_lines_are_problems_whose_reference_is_right(tmp_path: Path) -> None:
    path = write(tmp_path / "gsm.jsonl", [json.dumps(record) for record in GSM] + [""])
    task = RecordsTask(RecordsConfig(path=path, system="Think."))
    assert (task.name, task.num_problems) == ("gsm", 3)
    problems = [task.problem(i) for i in range(3)]
    assert [m["role"] for m in problems[0].messages or ()] == ["system", "user"]
    with VerifierPool(VerifierConfig(workers=1)) as pool:
        items = [(p, p.answer) for p in problems] + [(problems[2], "so \\boxed{1000 pies}"), (problems[1], "0.4")]
        scores = pool.score_all(task, [*items, (problems[0], "")])
    assert [score.value for score in scores] == [1, 1, 1, 1, 0, 0]
    assert scores[4].detail == "expected '1/2', got '0.4'"
    assert scores[5].detail.startswith("no answer found")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "bad.jsonl:2: not JSON"),
        ("[1]", "bad.jsonl:2: a record is list"),
        ('{"prompt": "x"}', "bad.jsonl:2: no field 'question'; the record has 'prompt'"),
        ('{"question": 3, "answer": "1"}', "bad.jsonl:2: 'question' is 3"),
        ('{"question": "x"}', "bad.jsonl:2: no field 'answer'"),
        ('{"question": "x", "answer": " "}', "bad.jsonl:2: 'answer' is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", [json.dumps(GSM[0]), line])
    with pytest.raises(FormatError, match=message.replace("[", r"\[")):
        RecordsTask(RecordsConfig(path=path))


def test_splits_are_by_prompt_and_wishes_are_checked(tmp_path: Path) -> None:
    records = [{"question": f"q{i % 50}", "answer": "1"} for i in range(100)]
    parts = {
        split: {
            str(task.problem(i).prompt)
            for task in [RecordsTask(RecordsConfig(split=split, held_out_share=0.3, form="plain"), records=records)]
            for i in range(task.num_problems or 0)
        }
        for split in ("train", "held_out", "all")
    }
    assert not parts["train"] & parts["held_out"]
    assert parts["train"] | parts["held_out"] == parts["all"]
    for config, given in ((RecordsConfig(path="x"), records), (RecordsConfig(), None), (RecordsConfig(), [])):
        with pytest.raises(ConfigError):
            RecordsTask(config, records=given)
    with pytest.raises(ConfigError, match="no_such_module"):
        RecordsTask(RecordsConfig(judge="no_such_module:score"), records=records)
    with pytest.raises(FormatError, match="cannot be read"):
        RecordsTask(RecordsConfig(path=str(tmp_path / "none.jsonl")))


def shortness(sample: Sample) -> float:
    """A user's function."""
    if sample.text == "explode":
        raise ValueError(f"cannot judge {sample.prompt}")
    return 1 / (1 + len(sample.text)) if sample.record.get("kind") != "odd" else float("nan")


def test_a_function_of_the_user_judges_prompts() -> None:
    config = RecordsConfig(judge="tests.envs.lm.test_records:shortness")
    task = RecordsTask(config, records=(p for p in ["a", {"question": "b", "kind": "odd"}]))
    first, odd = task.problem(0), task.problem(1)
    with VerifierPool() as pool:
        scores = pool.score_all(task, [(first, ""), (first, "abc"), (first, "explode"), (odd, "")])
    assert [score.verdict for score in scores[:2]] == [Verdict.SCORED] * 2
    assert [score.value for score in scores[:2]] == [1, 0.25]
    assert (scores[2].verdict, scores[2].detail[:25]) == (Verdict.FAILED, "ValueError: cannot judge ")
    assert (scores[3].verdict, "finite" in scores[3].detail) == (Verdict.FAILED, True)


LIMITS = SandboxConfig(timeout_s=30, cpu_s=1, memory_mb=256, file_mb=1)
CODE = [
    {
        "prompt": "f(x) = x + 1",
        "tests": ["assert f(1) == 2", "assert f(-1) == 0"],
        "solution": "def f(x): return x + 1",
    },
    {"prompt": "Twice.", "tests": [{"input": "21\n", "output": "42\n"}], "solution": "print(int(input()) * 2)"},
]


def test_programs_pass_or_fail_their_tests() -> None:
    task = CodeTask(CodeConfig(sandbox=LIMITS), records=CODE)
    share = CodeTask(CodeConfig(sandbox=LIMITS, reward="share"), records=CODE)
    add, twice = task.problem(0), task.problem(1)
    with VerifierPool(VerifierConfig(workers=2, timeout_s=100)) as pool:
        scores = pool.score_all(
            task,
            [(add, add.answer), (twice, twice.answer), (add, "f = abs"), (twice, "print(41)"), (add, "no program (")],
        )
        [half] = pool.score_all(share, [(add, "def f(x): return 2")])
    assert [score.value for score in scores] == [1, 1, 0, 0, 0]
    assert [score.detail.split(":")[0] for score in scores[2:]] == [
        "AssertionError",
        "printed '41\\n'; expected '42\\n'",
        "SyntaxError",
    ]
    assert half.value == 0.5
    with pytest.raises(FormatError, match=r"records\[0\].*tests"):
        CodeTask(CodeConfig(), records=[{"prompt": "x", "tests": []}])


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outside") / "victim"
    path.write_text("precious")
    return path


HARMFUL = {
    "import resource, signal; signal.raise_signal(signal.SIGXCPU)": "cpu_s=1",
    "x = bytearray(1 << 30)": "MemoryError",
    "import os\nwhile True: os.fork()": "Operation not permitted",
    "import subprocess; subprocess.run(['true'])": "Operation not permitted",
    "import socket; socket.socket()": "Operation not permitted",
    "import os; os.kill(os.getppid(), 9)": "Operation not permitted",
    "import os; os.kill(-1, 9)": "Operation not permitted",
    "open(VICTIM, 'w')": "Permission denied",
    "import os; os.unlink(VICTIM)": "Permission denied",
    "import os; os.chmod(VICTIM, 0)": "Operation not permitted",
    "import os; os.rename(VICTIM, 'mine')": "Permission denied",
    "f = open('big', 'w')\nwhile True: f.write('x' * 100000)": "File too large",
    "while True: print('x' * 100000)": "File too large",
    "import os; os._exit(0)": "ended before its tests did",
    "raise SystemExit(0)": "ended before its tests did",
    "import os; os.abort()": "SIGABRT",
    "import ctypes; ctypes.string_at(0)": "SIGSEGV",
}


@pytest.mark.skipif(os.name != "posix" or not Path("/sys/kernel").exists(), reason="confinement is the Linux kernel's")
@pytest.mark.parametrize("program", HARMFUL)
def test_a_harmful_program_harms_nothing(program: str, victim: Path) -> None:
    run = run_program(f"VICTIM = {str(victim)!r}\n{program}", LIMITS, tests="assert True")
    assert (run.is_finished, HARMFUL[program] in run.detail) == (False, True), run
    assert victim.read_text() == "precious"
    assert victim.stat().st_mode & 0o777


@pytest.mark.slow
def test_what_a_program_may_do() -> None:
    program = """
import collections, json, math, os, re, threading
open("note", "w").write("kept")
thread = threading.Thread(target=print, args=(open("note").read(), len(os.environ)))
thread.start(); thread.join()
os.makedirs("a/b"); os.rename("note", "a/b/note")
"""
    run = run_program(program, LIMITS)
    assert (run.is_finished, run.detail) == (True, "")
    assert run.output.startswith("kept ")
    for forever in ("import time; time.sleep(60)", "while True: pass"):
        late = run_program(forever, SandboxConfig(timeout_s=1))
        assert (late.is_finished, late.detail) == (False, "took more than timeout_s=1")
