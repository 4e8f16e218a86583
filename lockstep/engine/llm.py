"""Offline generation: prompts in, samples out.

Legend: N texts, E model width.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from lockstep.core.collector import collector_paused
from lockstep.core.errors import ConfigError, InputError
from lockstep.core.request import Request, Sample, WeightsVersion
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.engine import Engine
from lockstep.engine.pooling import Pooling, embed
from lockstep.interop.hf.peft import load_adapter
from lockstep.interop.weights import open_weights
from lockstep.kernels import set_num_threads
from lockstep.models.digest import adapter_digest
from lockstep.models.families import load_model
from lockstep.models.language import LanguageModel
from lockstep.tokenize.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""A text, or token ids."""


class LLM:
    """A model with its tokenizer and an engine.

    Args:
        model: a GGUF file, a model folder, a hub id, or a loaded model.
        tokenizer: for a loaded model; None: prompts are ids.
        dtype: of a model that is loaded here: "auto", "fp32", "bf16", "int8" or "int4"; of the draft too.
        draft: a small model of the same vocabulary that guesses ahead, loaded or by name; texts stay the same.
        memory_bytes: for keys and values; None: half of what is free.
        num_threads: of the kernels of this process (0: one a processor); texts do not depend on it.

    Raises:
        InputError, ConfigError: no such model, or one that cannot be served.
    """

    def __init__(
        self,
        model: str | Path | LanguageModel,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        dtype: str = "auto",
        draft: str | Path | LanguageModel | None = None,
        memory_bytes: int | None = None,
        num_threads: int = 0,
    ) -> None:
        set_num_threads(num_threads)
        if isinstance(model, str | Path):
            if tokenizer is not None:
                raise ConfigError("a model that is loaded by name brings its own tokenizer; leave tokenizer out")
            model, tokenizer = load(model, dtype)
        if isinstance(draft, str | Path):
            draft = load_draft(draft, tokenizer, dtype)
        self.tokenizer = tokenizer
        self.engine = Engine(
            model,
            tokenizer,
            config,
            draft=draft,
            memory_bytes=free_memory() // 2 if memory_bytes is None else memory_bytes,
        )
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008  (frozen)
        *,
        progress: bool = False,
        adapter: str = "",
    ) -> list[list[Sample]]:
        """The n samples of each prompt, in the order of the prompts.

        Args:
            prompts: one or several; ids must not be nested deeper than a list of ids a prompt.
            params: for all, or one for each prompt.
            progress: show a bar with tokens per second.
            adapter: name of a loaded one, for all prompts; empty: the model alone.

        Raises:
            InputError: a prompt that does not fit, before anything runs on, or a grammar that cannot be used; what already
                runs is aborted.
        """
        listed = as_prompts(prompts)
        wishes = [params] * len(listed) if isinstance(params, SamplingParams) else list(params)
        if len(wishes) != len(listed):
            raise InputError(f"{len(wishes)} params for {len(listed)} prompts; give one, or as many", field="params")
        waiting = deque(
            Request(id=self._next_id(), prompt=self.encode(prompt), params=wish, adapter=adapter)
            for prompt, wish in zip(listed, wishes, strict=True)
        )
        ids = [request.id for request in waiting]
        samples: dict[str, list[Sample]] = {}
        try:
            with _bar(sum(request.params.n for request in waiting), shown=progress) as advance:
                while waiting or self.engine.has_work:
                    while waiting and self._has_room(waiting[0]):
                        request = waiting.popleft()
                        samples[request.id] = self.engine.add(request)
                    outputs = self.engine.step()
                    for output in outputs:
                        if output.sample.error_field:
                            raise InputError(output.sample.error, field=output.sample.error_field)
                    advance(sum(o.is_finished for o in outputs), sum(o.num for o in outputs))
        finally:
            for request_id in ids:
                self.engine.abort(request_id)
        return [samples[request_id] for request_id in ids]

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Loads a low-rank adapter from a PEFT folder; `generate(..., adapter=name)` then takes it.

        Raises:
            InputError, FormatError: there is none, or it does not fit this model.
        """
        model = self.engine.model
        assert isinstance(model, LanguageModel)
        adapter = load_adapter(model, folder)
        self.engine.adapters.load(name, adapter, WeightsVersion(0, adapter_digest(adapter)))

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling: Pooling = Pooling.LAST, *, normalise: bool = True
    ) -> Tensor:
        """A float32 vector for each text, [N, E]; see `pooling.embed`."""
        return embed(self.engine.model, [self.encode(p) for p in as_prompts(prompts)], pooling, normalise=normalise)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a prompt; a text gets what the vocabulary puts around texts."""
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.tokenizer is None:
            raise InputError("the prompt is a text and there is no tokenizer; give token ids", field="prompts")
        return tuple(self.tokenizer.encode(prompt, add_special=True, parse_special=True))

    def _has_room(self, request: Request) -> bool:
        waiting, most = len(self.engine.scheduler.waiting), self.engine.plan.max_queue
        # One that never fits is added all the same: the engine says why it cannot be.
        num = request.params.num_sequences
        return waiting + num <= most or num > most

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"llm-{self._num_requests}"


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, of one or of several.

    >>> as_prompts("hello"), as_prompts([1, 2]), as_prompts([[1, 2], "a"])
    (['hello'], [[1, 2]], [[1, 2], 'a'])
    """
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def load(model: str | Path, dtype: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """A model and its tokenizer, for serving.

    Args:
        model: a GGUF file, a model folder or a hub id.
    """
    with collector_paused():
        source = open_weights(model)
    # Side by side: packing weights needs no interpreter, and a tokenizer of 150,000 tokens little else.
    with collector_paused(), ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_model, source, dtype)
        described = source.tokenizer()
        if isinstance(described, Path):
            tokenizer = Tokenizer.from_folder(described)
        else:
            tokenizer = Tokenizer.from_gguf_metadata(described)
        return loading.result(), tokenizer


def load_draft(draft: str | Path, tokenizer: Tokenizer | None, dtype: str = "auto") -> LanguageModel:
    """A draft model for the model whose tokenizer this is.

    Raises:
        ConfigError: its vocabulary is another one.
    """
    model, own = load(draft, dtype)
    if tokenizer is not None and own.vocabulary.tokens != tokenizer.vocabulary.tokens:
        raise ConfigError(
            f"the draft model {draft} has a vocabulary of its own ({own.vocab_size} tokens; the served model "
            f"{tokenizer.vocab_size}); a draft must share the vocabulary: take one of the same family"
        )
    return model


def free_memory() -> int:
    """Bytes that can be had now; a quarter of the whole where the system does not say."""
    page = os.sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return page * os.sysconf("SC_AVPHYS_PAGES")
    return page * os.sysconf("SC_PHYS_PAGES") // 4


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator:
    """Yields advance(samples finished, tokens generated)."""
    if not shown:
        yield lambda finished, tokens: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[tokens]} tokens, {task.fields[rate]:.0f} tok/s")) as progress:
        task = progress.add_task("samples", total=total, tokens=0, rate=0.0)
        num = 0

        def advance(finished: int, tokens: int) -> None:
            nonlocal num
            num += tokens
            elapsed = progress.tasks[0].elapsed or 0.0
            progress.update(task, advance=finished, tokens=num, rate=num / elapsed if elapsed else 0.0)

        yield advance
