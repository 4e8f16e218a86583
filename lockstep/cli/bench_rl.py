"""`lockstep bench rl`: what exactness costs the learner; with `--peer trl` a whole step beside TRL's GRPO.

Exactness: one optimiser step on the same packed batch, with our batch-invariant products in the forward pass and with
PyTorch's, in turn in one process. Peer: a process each, asked for steps in turn; ratios are of medians.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from lockstep import kernels
from lockstep.cli.engine_bench.process import Worker
from lockstep.cli.figures import measured_with
from lockstep.cli.rl_bench.ours import Plan
from lockstep.cli.rl_bench.plain import with_torch_products
from lockstep.core.errors import ConfigError
from lockstep.learn.learner import Learner, LearnerConfig
from lockstep.learn.model import ModelConfig, TrainedModel, build
from lockstep.learn.optimiser import OptimiserConfig
from lockstep.learn.packing import Example, MicroBatch, micro_batches
from lockstep.rl.lm.algorithms import ALGORITHMS
from lockstep.rl.lm.losses import Counts, policy_loss

DEADLINE_S = 600.0
EXACT_TARGET, PEER_TARGET = 1.05, 5.0
HERE = Path(__file__).parent / "rl_bench"


@dataclass(frozen=True)
class RlBenchArgs:
    """Measure the price of exactness, and a whole GRPO step beside TRL's."""

    peer: Literal["none", "trl"] = "none"
    """Whose loop to measure beside."""
    peer_python: Path = Path(sys.executable)
    """The Python that has it (`pip install trl`), if not this one."""
    rounds: int = 7
    """Measured steps of each side, after one to warm up."""
    threads: int = 2
    """Threads of either side."""
    width: int = 256
    """Of the model."""
    layers: int = 4
    """Of the model."""
    groups: int = 8
    """Prompts of a step."""
    group_size: int = 8
    """Samples of each."""
    max_tokens: int = 32
    """Tokens of a sample."""
    prompt_words: int = 16
    """Words of a prompt."""
    json: Path | None = None
    """Also write the figures to this file."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(RlBenchArgs, args=list(args), prog="lockstep bench rl")
    if min(wish.rounds, wish.threads, wish.groups, wish.group_size, wish.max_tokens) < 1:
        raise ConfigError("rounds, threads, groups, group_size and max_tokens must be at least 1")
    kernels.set_num_threads(wish.threads)
    prompts = _prompts(wish)
    with tempfile.TemporaryDirectory() as folder:
        made = _model(wish, prompts, Path(folder))
        size = sum(parameter.numel() for parameter in made.model.parameters())
        print(f"model of {size:,} parameters; {wish.groups} x {wish.group_size} samples of {wish.max_tokens} tokens")
        figures: dict[str, Any] = {
            "parameters": size,
            "settings": _plain(wish),
            "exactness": exactness(wish, made, prompts),
        }
        _say_exactness(figures["exactness"])
        if wish.peer == "trl":
            figures["trl"] = beside_trl(wish, made, prompts, Path(folder))
            _say_peer(figures["trl"])
    if wish.json is not None:
        wish.json.write_text(json.dumps({"versions": measured_with(), **figures}, indent=2) + "\n")
    return 0


def exactness(wish: RlBenchArgs, made: TrainedModel, prompts: Sequence[str]) -> dict[str, Any]:
    """Seconds of a learner's step on one batch, with either products."""
    rng = random.Random(0)
    examples = []
    for place in range(wish.groups * wish.group_size):
        ids = made.tokenizer.encode(prompts[place // wish.group_size], add_special=True, parse_special=False)
        text = [rng.randrange(3, made.tokenizer.vocab_size) for _ in range(wish.max_tokens)]
        num = len(ids) + len(text)
        columns = {"advantage": [rng.gauss(0, 1)] * num, "sampling_logprob": [-1.0] * num}
        examples.append(Example.of([*ids, *text], weight=[0.0] * len(ids) + [1.0] * len(text), columns=columns))
    micros, counts = micro_batches(examples, 8192), Counts.of(examples)
    config = LearnerConfig(optimiser=OptimiserConfig(lr=1e-4))
    learners = {
        "exact": Learner(copy.deepcopy(made.model), config),
        "torch": Learner(with_torch_products(copy.deepcopy(made.model)), config),
    }
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    losses: dict[str, float] = {}
    for number in range(wish.rounds + 1):
        for name, learner in learners.items():
            began = time.perf_counter()
            losses[name] = _step(learner, micros, counts)
            if number:
                seconds[name].append(time.perf_counter() - began)
    # The same step but for rounding, or the comparison is of two things.
    if abs(losses["exact"] - losses["torch"]) > 1e-3:
        raise ConfigError(f"the two learners disagree, losses {losses}; their times cannot be compared")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = sum(micro.num_tokens for micro in micros)
    ratio = statistics.median(a / b for a, b in zip(seconds["exact"], seconds["torch"], strict=True))
    return {"tokens": tokens, "seconds": seconds, "medians": medians, "ratio": ratio}


def beside_trl(wish: RlBenchArgs, made: TrainedModel, prompts: Sequence[str], folder: Path) -> dict[str, Any]:
    """Steps of both loops in turn.

    Raises:
        ConfigError: a side failed; the message has its last lines.
        DeadlineError: a side did not answer.
    """
    made.write(folder / "model", {}, "bench")
    lines = folder / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    plan = Plan(
        model=str(folder / "model"),
        prompts=str(lines),
        groups=wish.groups,
        group_size=wish.group_size,
        max_tokens=wish.max_tokens,
        threads=wish.threads,
        lr=1e-4,
    )
    threads = {"OMP_NUM_THREADS": str(wish.threads)}
    commands = {
        "lockstep": [sys.executable, "-m", "lockstep.cli.rl_bench.ours"],
        "trl": [str(wish.peer_python), str(HERE / "peer_trl.py")],
    }
    found: dict[str, Any] = {name: [] for name in commands}
    with (
        Worker("lockstep", commands["lockstep"], DEADLINE_S, threads) as ours,
        Worker("trl", commands["trl"], DEADLINE_S, threads) as trl,
    ):
        for worker in (ours, trl):
            worker.tell(asdict(plan))
        for number in range(wish.rounds + 1):
            for worker in (ours, trl):
                answer = worker.ask("step")
                if number:
                    found[worker.name].append(answer)
    return found


def _step(learner: Learner, micros: Sequence[MicroBatch], counts: Counts) -> float:
    return learner.step(micros, policy_loss(ALGORITHMS["dapo"], counts), entropy=True)["loss"]


def _prompts(wish: RlBenchArgs) -> list[str]:
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(200)]
    num = 2 * wish.groups * (wish.rounds + 2)
    return [" ".join(rng.choices(words, k=wish.prompt_words)) + ":" for _ in range(num)]


def _model(wish: RlBenchArgs, prompts: Sequence[str], folder: Path) -> TrainedModel:
    sizes = ModelConfig(width=wish.width, hidden=3 * wish.width, num_layers=wish.layers, num_heads=wish.width // 32)
    return build(sizes, prompts, 1, folder / "tokenizer")


def _plain(wish: RlBenchArgs) -> dict[str, Any]:
    return {name: value.name if isinstance(value, Path) else value for name, value in asdict(wish).items()}


def _say_exactness(figures: dict[str, Any]) -> None:
    exact, torch = (figures["medians"][name] for name in ("exact", "torch"))
    print(f"learner's step of {figures['tokens']:,} tokens, medians")
    print(f"  exact products    {exact:8.4f} s   {figures['tokens'] / exact:10,.0f} tok/s")
    print(f"  PyTorch's         {torch:8.4f} s   {figures['tokens'] / torch:10,.0f} tok/s")
    verdict = "met" if figures["ratio"] <= EXACT_TARGET else "NOT met"
    print(f"  exact / PyTorch's {figures['ratio']:8.3f}     (target <= {EXACT_TARGET}: {verdict})")


def _say_peer(figures: dict[str, Any]) -> None:
    medians = {
        name: {
            what: statistics.median(one[what] for one in answers)
            for what in ("rollout_s", "learn_s", "step_s", "cpu_s", "tokens")
        }
        for name, answers in figures.items()
    }
    ours, peer = medians["lockstep"], medians["trl"]
    print(f"a step beside TRL {figures['trl'][0]['version']}, medians of {len(figures['trl'])}")
    print("                   lockstep            trl          ratio")
    for title, what in (("rollout", "rollout_s"), ("learning", "learn_s")):
        rates = [side["tokens"] / side[what] for side in (ours, peer)]
        print(f"  {title:<9} {rates[0]:10,.0f} tok/s {rates[1]:8,.0f} tok/s {rates[0] / rates[1]:8.1f}")
    ratio = statistics.median(
        b["step_s"] / a["step_s"] for a, b in zip(figures["lockstep"], figures["trl"], strict=True)
    )
    verdict = "met" if ratio >= PEER_TARGET else "NOT met"
    seconds = f"{ours['step_s']:10.3f} s     {peer['step_s']:8.3f} s     {ratio:8.1f}"
    print(f"  step      {seconds}  (target >= {PEER_TARGET:g}: {verdict})")
    cpu = statistics.median(b["cpu_s"] / a["cpu_s"] for a, b in zip(figures["lockstep"], figures["trl"], strict=True))
    print(f"  processor {ours['cpu_s']:10.3f} s     {peer['cpu_s']:8.3f} s     {cpu:8.1f}  of a step, all threads")
