"""Answers judged by a reward model (Ouyang et al. 2022): the task that a model from `lockstep train reward-jsonl` makes.

lockstep train grpo-task --task.name lockstep.rl.lm.rewarded:Rewarded --task.options path prompts.jsonl reward runs/reward-...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, final

from lockstep.core.errors import ConfigError
from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.records import RecordsConfig, RecordsTask
from lockstep.envs.lm.task import Task
from lockstep.interop.weights import open_weights
from lockstep.learn.data import DataConfig, Renderer
from lockstep.learn.heads import ScalarHead
from lockstep.learn.reward_model import score
from lockstep.models.dict_source import DictSource
from lockstep.models.families import load_model
from lockstep.models.language import LanguageModel
from lockstep.tokenize.tokenizer import Tokenizer

HEAD = "score.weight"


@final
class Rewarded(Task):
    """Prompts of a JSONL file; an answer's score is the reward model's number, which has no bounds.

    Args:
        split, seed: as training gives them; the order is the run's.
        path: JSONL of records with the prompt, text or messages.
        reward: the run's directory or its model folder; a sequence classifier of one label.
        prompt_key: field of the prompt.
        form: of a prompt that is a text, to the model that answers; the reward model reads it as it stands.
        held_out_share: of the records.
        max_tokens: of prompt and answer together; a longer answer is judged by its beginning.

    An answer is a forward pass of its own; `verifier.workers` share them, each with a copy of the model.

    Raises:
        ConfigError: no reward model there.
        FormatError: a record without a prompt.
    """

    def __init__(
        self,
        split: Literal["train", "held_out"] = "train",
        seed: int = 0,
        *,
        path: str,
        reward: str,
        prompt_key: str = "prompt",
        form: Literal["plain", "chat"] = "chat",
        held_out_share: float = 0.1,
        max_tokens: int = 4096,
    ) -> None:
        self._arguments = {
            "split": split,
            "seed": seed,
            "path": path,
            "reward": reward,
            "prompt_key": prompt_key,
            "form": form,
            "held_out_share": held_out_share,
            "max_tokens": max_tokens,
        }
        # The judge is a name that makes a reference answer optional; the scores come from here.
        self._records = RecordsTask(
            RecordsConfig(
                path=path,
                prompt_key=prompt_key,
                split=split,
                held_out_share=held_out_share,
                form=form,
                judge="lockstep.rl.lm.rewarded:load_reward_model",
            )
        )
        if not (Path(reward) / "config.json").is_file():
            raise ConfigError(f"reward={reward!r} is no folder of a model; give a run of `lockstep train reward-jsonl`")
        self._loaded: tuple[LanguageModel, ScalarHead, Renderer] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._arguments,)

    @property
    def name(self) -> str:
        return f"{self._records.name}+reward"

    @property
    def num_problems(self) -> int | None:
        return self._records.num_problems

    def problem(self, index: int) -> Problem:
        return self._records.problem(index)

    def score(self, problem: Problem, text: str) -> Score:
        if self._loaded is None:
            self._loaded = load_reward_model(str(self._arguments["reward"]), int(self._arguments["max_tokens"]))
        model, head, renderer = self._loaded
        # As the reward model learned it: a text as it stands, messages by the model's own template.
        prompt, where = problem.data["record"][self._arguments["prompt_key"]], f"problem {problem.index}"
        answer = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        row = {"prompt": prompt, "answer": answer}
        example = renderer.completion(renderer.prompt(row, where), renderer.answer(row, "answer", where), where)
        if example is None:
            raise ConfigError(f"{where}: its prompt alone has more than {renderer.limit} tokens; nothing can be judged")
        return Score.of(score(model, head, [example], renderer.limit)[0])


def load_reward_model(path: str, max_tokens: int) -> tuple[LanguageModel, ScalarHead, Renderer]:
    """(trunk, head, what renders its texts) of a sequence classifier of one label.

    Raises:
        ConfigError: another kind of model, or a file without a tokenizer.
        InputError, FormatError: it cannot be read.
    """
    source = open_weights(path)
    values, described = source.config(), source.tokenizer()
    name = str((values.get("architectures") or [""])[0])
    if not name.endswith("ForSequenceClassification") or source.shape(HEAD)[0] != 1 or not isinstance(described, Path):
        raise ConfigError(f"{path} is a {name or 'model'}; expected a reward model, a sequence classifier of one label")
    base = name.removesuffix("ForSequenceClassification")
    # No text is written, so the head of logits may be any: the embedding is there.
    values |= {"architectures": [f"{base}ForCausalLM", f"{base}LMHeadModel"], "tie_word_embeddings": True}
    tensors = {one: source.tensor(one) for one in source.names() if one != HEAD}
    model = load_model(DictSource(tensors, values), "fp32")
    head = ScalarHead(model.facts.width)
    head.load_state_dict({next(iter(head.state_dict())): source.tensor(HEAD).float()})
    config = DataConfig(max_tokens=max_tokens, too_long="cut")
    return model, head, Renderer(Tokenizer.from_folder(described), config, model.max_context - 1)


def _restored(arguments: dict[str, Any]) -> Rewarded:
    return Rewarded(**arguments)
