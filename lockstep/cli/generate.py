"""`lockstep generate`: texts that go on from prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lockstep.cli.model_words import refuse_unfinished
from lockstep.cli.store_args import stored_path, suggesting
from lockstep.core.errors import ConfigError
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.llm import LLM


@dataclass(frozen=True)
class SamplingArgs:
    """How tokens are drawn."""

    max_tokens: int | None = None
    """Tokens to generate; None: as many as the context allows."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    """Keep the most probable tokens that together have this probability; 1: all."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the greatest probability; 0: all."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens seen before; 1: none."""
    seed: int | None = None
    """Same seed, same text."""
    stop: tuple[str, ...] = ()
    """Strings that end the text."""

    def params(self, n: int = 1) -> SamplingParams:
        """As the engine takes them."""
        return SamplingParams(**vars(self), n=n)


@dataclass(frozen=True)
class ModelArgs:
    """How the model is held."""

    dtype: str = "auto"
    """Of the weights: auto, fp32, bf16, int8 or int4."""
    max_context: int | None = None
    """Tokens of prompt and text together; None: as many as the model knows and memory holds."""
    kv_memory_mib: int | None = None
    """Memory for keys and values, in MiB; None: half of what is free."""
    draft: str = ""
    """A small model of the same vocabulary that guesses ahead; texts stay the same."""
    num_threads: int = 0
    """Threads of the model (0: one a processor); texts stay the same."""
    store: Path | None = None
    """Folder of the model store; None: lockstep/models in the user's cache."""

    def load(self, model: str, max_sequences: int) -> LLM:
        """The model, ready to generate."""
        refuse_unfinished(Path(model))
        mib = self.kv_memory_mib
        with suggesting(model, self.store):
            return LLM(
                stored_path(model, self.store),
                config=EngineConfig(max_context=self.max_context, max_sequences=max_sequences),
                dtype=self.dtype,
                draft=self.draft or None,
                memory_bytes=None if mib is None else mib * 2**20,
                num_threads=self.num_threads,
            )


@dataclass(frozen=True)
class GenerateArgs:
    """Go on from prompts; each text is printed after its prompt. Without prompts, each line of the input is one."""

    model: Annotated[str, tyro.conf.Positional]
    """A GGUF file, a Hugging Face folder, a name in the store, or a hub id."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to go on from (default: each line of the input)."""
    n: int = 1
    """Texts for each prompt."""
    sampling: Annotated[SamplingArgs, tyro.conf.arg(name="")] = field(default_factory=SamplingArgs)
    held: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(GenerateArgs, args=list(args), prog="lockstep generate")
    if not wish.prompts and sys.stdin.isatty():
        print("prompts, one a line; ctrl-d ends", file=sys.stderr)
    prompts = list(wish.prompts) or [line.rstrip("\n") for line in sys.stdin]
    if not prompts:
        raise ConfigError("no prompts; give them after the model, or one a line on the input")
    llm = wish.held.load(wish.model, max_sequences=64)
    empty = [str(place) for place, prompt in enumerate(prompts, 1) if not llm.encode(prompt)]
    if empty:
        raise ConfigError(
            f"prompt {', '.join(empty[:8])} of {len(prompts)} has no tokens; there is nothing to go on from"
        )
    shows_bar = sys.stderr.isatty() and not sys.stdout.isatty()
    for prompt, samples in zip(
        prompts, llm.generate(prompts, wish.sampling.params(wish.n), progress=shows_bar), strict=True
    ):
        for sample in samples:
            print(prompt + sample.text, flush=True)
    return 0
