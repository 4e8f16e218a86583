"""TRL's side, run by the Python that has `trl`: its GRPOTrainer, on the processor, told the same batch and optimiser step.

The first line of stdin is the plan; then a step for each line. The trainer runs its own loop and waits where a step begins.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from typing import Any


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def main() -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    plan = json.loads(sys.stdin.readline())
    torch, transformers, datasets, trl = (
        importlib.import_module(name) for name in ("torch", "transformers", "datasets", "trl")
    )
    torch.set_num_threads(plan["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(plan["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with open(plan["prompts"]) as file:
        data = datasets.Dataset.from_list([json.loads(line) for line in file])
    settings = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=plan["groups"] * plan["group_size"],
        gradient_accumulation_steps=1,
        num_generations=plan["group_size"],
        max_completion_length=plan["max_tokens"],
        learning_rate=plan["lr"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        beta=0.0,
        loss_type="dapo",
        epsilon_high=0.28,
        temperature=1.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=1 << 20,
    )
    clock: dict[str, float] = {}

    class Paced(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            clock["began"], clock["cpu"] = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = time.perf_counter() - clock["began"]
            answer = {"step_s": seconds, "rollout_s": clock["rollout"], "tokens": clock["tokens"]}
            answer |= {"learn_s": seconds - clock["scored"], "version": trl.__version__}
            answer["cpu_s"] = time.process_time() - clock["cpu"]
            out.write(json.dumps(answer) + "\n")
            out.flush()

    class Timed(trl.GRPOTrainer):  # type: ignore[name-defined, misc]
        def _generate(self, prompts: Any) -> Any:
            began = time.perf_counter()
            made = super()._generate(prompts)
            clock["rollout"] = time.perf_counter() - began
            clock["tokens"] = float(sum(len(ids) for ids in made[1]))
            return made

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            began = time.perf_counter()
            made = super()._generate_and_score_completions(inputs)
            clock["scored"] = time.perf_counter() - began
            return made

    model = transformers.AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.float32)
    trainer = Timed(
        model=model,
        reward_funcs=vowels,
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Paced()],
    )
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
