"""Answers judged by a reward model: the numbers of the model that was trained, and a run on them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lockstep.core.errors import ConfigError
from lockstep.interop.hf.save import save_folder
from lockstep.learn.data import DataConfig, Renderer
from lockstep.learn.heads import ScalarHead
from lockstep.learn.model import ModelConfig, TrainedModel, build
from lockstep.learn.reward_model import save_reward_model, score
from lockstep.models.families import hf_tensors
from lockstep.rl.lm.rewarded import Rewarded, load_reward_model
from tests.learn.conftest import write_rows
from tests.rl.lm.small import config, run

SIZES = ModelConfig(width=32, hidden=64, num_layers=1, num_heads=2, vocab_size=280, max_context=64)
ROWS = [{"prompt": f"say {number}:"} for number in range(20)]
NAME = "lockstep.rl.lm.rewarded:Rewarded"


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TrainedModel, ScalarHead]:
    """(folder, model, head) of a reward model that has learned nothing."""
    made, head = build(SIZES, ["say 1: 7"], 1, None), ScalarHead(SIZES.width)
    head.fill_random(torch.Generator().manual_seed(1), 1.0)
    folder = tmp_path_factory.mktemp("rm")
    save_reward_model(folder / "model", made, head)
    return str(folder / "model"), made, head


@pytest.mark.parametrize("in_messages", [False, True])
def test_scores_are_the_reward_models(
    in_messages: bool, reward: tuple[str, TrainedModel, ScalarHead], tmp_path: Path
) -> None:
    folder, made, head = reward
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS] if in_messages else ROWS
    task = pickle.loads(pickle.dumps(Rewarded(path=write_rows(tmp_path / "prompts.jsonl", rows), reward=folder)))
    problem, answers = task.problem(3), ["7", "no"]
    pair = [[{"role": "assistant", "content": answer}] if in_messages else answer for answer in answers]
    row = {"prompt": problem.data["record"]["prompt"], "chosen": pair[0], "rejected": pair[1]}
    examples = Renderer(made.tokenizer, DataConfig()).pair(row, "x")
    assert examples is not None
    found = [task.score(problem, answer).value for answer in answers]
    assert found == score(made.model, head, list(examples), 500)
    assert found[0] != found[1]


def test_a_run_learns_from_a_reward_model(reward: tuple[str, TrainedModel, ScalarHead], tmp_path: Path) -> None:
    options: dict[str, bool | int | float | str] = {"reward": reward[0], "form": "plain", "held_out_share": 0.3}
    options["path"] = write_rows(tmp_path / "prompts.jsonl", ROWS)
    wish = config(run__total_steps=1, start__steps=0)
    _, lines = run(replace(wish, task=replace(wish.task, name=NAME, options=options)))
    assert lines[0][1]["grad_norm"] > 0.0
    assert lines[0][1]["uniform"] == 0.0


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", ROWS)
    with pytest.raises(ConfigError, match="no folder of a model"):
        Rewarded(path=path, reward=str(tmp_path / "none"))
    made = build(SIZES, ["say 1: 7"], 1, None)
    save_folder(tmp_path / "lm", made.config, hf_tensors(made.model, made.config), tokenizer_from=made.tokenizer_folder)
    with pytest.raises(ConfigError, match="is a Qwen3ForCausalLM; expected a reward model"):
        load_reward_model(str(tmp_path / "lm"), 64)
