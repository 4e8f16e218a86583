"""`lockstep quickstart language`: a new model learns by reinforcement, is served, and answers a problem it never met."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.api import read_config, train
from lockstep.cli.quickstart_control import free_port, stop, wait_ready
from lockstep.cli.train import columns, report
from lockstep.core.extras import require
from lockstep.core.trajectory import Problem
from lockstep.envs.lm.make import make_tasks
from lockstep.envs.lm.task import Task
from lockstep.learn.session import Result
from lockstep.recipes import recipe
from lockstep.rl.lm.problems import first_problems
from lockstep.runs.console import ProgressDisplay

RECIPE = "grpo-spell-backward"
TARGET_GAIN = 0.20


def main(args: Sequence[str]) -> int:
    if args:
        print(f"usage: lockstep quickstart language   (no arguments; trains the recipe {RECIPE})")
        return 0 if args[0] in ("-h", "--help") else 2
    openai = require("openai", extra="quickstart")
    print(f"1. train: {RECIPE}, a new model on reasoning-gym's problems\n")
    config = recipe(RECIPE)
    with ProgressDisplay(config.run.total_steps, RECIPE, columns=columns(config)) as display:
        run = train(
            config, recipe_name=RECIPE, name=RECIPE, on_progress=lambda step, _, line: display.update(step, dict(line))
        )
    report(run)
    result = run.result
    assert isinstance(result, Result)
    assert result.first is not None
    assert result.last is not None
    print("\n2. serve it, and ask a held-out problem through the OpenAI client\n")
    task = make_tasks(read_config(run.path).task)[1]
    assert isinstance(task, Task)
    problem = first_problems(task, 1)[0]
    text = ask_once(openai, run.path, problem)
    score = task.score(problem, text)
    assert problem.messages is not None
    print(f"question         {problem.messages[-1]['content']}")
    print(f"answer           {text}")
    print(f"verdict          {'right' if score.value >= 1.0 else f'wrong; expected {problem.answer}'}")
    gain = result.last.mean - result.first.mean
    good = gain >= TARGET_GAIN
    greedy = result.last.extra["greedy"] - result.first.extra["greedy"]
    print(
        f"\nreinforcement added {100 * gain:.1f} points on held-out problems, answers sampled at temperature "
        f"{config.evaluation.temperature:g} ({100 * greedy:.1f} on the most probable answers); wanted {100 * TARGET_GAIN:.0f}"
    )
    return 0 if good else 1


def ask_once(openai: Any, run: Path, problem: Problem) -> str:
    """Start `lockstep serve` on a free port, send one chat request, stop it; returns the answer."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "lockstep.cli.main",
        "serve",
        str(run),
        "--port",
        str(port),
        "--served-name",
        "mine",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_ready(f"http://127.0.0.1:{port}/ready", process)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
        began = time.perf_counter()
        reply = client.chat.completions.create(
            model="mine", messages=list(problem.messages or ()), temperature=0.0, max_tokens=32
        )
        print(f"POST http://127.0.0.1:{port}/v1/chat/completions: {1000 * (time.perf_counter() - began):.0f} ms")
        return str(reply.choices[0].message.content)
    finally:
        stop(process)
