"""The language model behind the routes: its life from loading to the end, its tokenizer, its engine.

    LOADING --load thread--> READY --SIGTERM--> DRAINING --(nothing runs, or drain_s over)--> ENDED
        '------------------> FAILED

Requests are served while READY; in every other state they are answered 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from lockstep.core.collector import collector_paused
from lockstep.core.errors import ConfigError, InputError, LockstepError, ServingError
from lockstep.core.request import Request, WeightsVersion
from lockstep.core.sampling import SamplingParams
from lockstep.engine.async_engine import AsyncEngine
from lockstep.engine.engine import Engine
from lockstep.engine.llm import free_memory, load, load_draft
from lockstep.engine.pooling import Pooling, embed
from lockstep.interop.hf.peft import load_adapter
from lockstep.kernels import set_num_threads
from lockstep.models.digest import adapter_digest, weights_digest
from lockstep.models.language import LanguageModel
from lockstep.server.language_config import LanguageConfig
from lockstep.server.language_metrics import LanguageMetrics, Snapshot
from lockstep.server.replies import Refusal
from lockstep.server.run_folder import run_folder, signature
from lockstep.tokenize.chat import ChatTemplate
from lockstep.tokenize.reasoning import ReasoningSplitter, prompt_opens_reasoning
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.tools import OutputParser, tool_format_of, tool_parser

HEALTH_S = 10.0
POLL_S = 0.02
log = logging.getLogger("lockstep.server")


class State(Enum):
    """Where the service is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    ENDED = "ended"


class LanguageService:
    """One model for all routes.

    Args:
        model: a GGUF file, a model folder, a hub id, or a loaded model with its tokenizer.
    """

    def __init__(self, model: str | Path | tuple[LanguageModel, Tokenizer], config: LanguageConfig) -> None:
        self.config = config
        self.metrics = LanguageMetrics()
        self.state = State.LOADING
        self.error: Exception | None = None
        self.created = int(time.time())
        self.name = config.served_name or ("model" if isinstance(model, tuple) else Path(model).stem or str(model))
        self.followed = None if isinstance(model, tuple) else run_folder(Path(model))
        """Where a run may write the model's successors."""
        self.followed_from = () if self.followed is None else signature(self.followed)
        """The folder as it is before the model is read, so that no change is missed."""
        self.adapters: dict[str, str] = {}
        """Where each low-rank adapter that clients may name came from; the engine's own table follows."""
        self._fingerprint: asyncio.Task[None] | None = None
        self._model = model
        self._loading: Future[Engine] | None = None
        self._engine: AsyncEngine | None = None
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | ConfigError | None = None
        self._snapshot: Snapshot | None = None

    async def start(self) -> None:
        """Load, generate one token as a proof, be ready. What fails is kept in `error`."""
        started = time.monotonic()
        log.info("model %s is being loaded; until it is there requests are answered 503", self.name)
        try:
            engine = await asyncio.wrap_future(begin_loading(self))
            self._tokenizer = engine.tokenizer
            self._template = _chat_template(engine.tokenizer, self.config.chat_template)
            self._engine = AsyncEngine(engine)
            self._engine.start()
            params = SamplingParams(max_tokens=1, temperature=0.0)
            async with aclosing(self._engine.generate(Request(id="proof", prompt=(0,), params=params))) as outputs:
                async for _ in outputs:
                    pass
        except Exception as error:  # told by /health and by the process' end
            self.state, self.error = State.FAILED, error
            log.error("the model cannot be served: %s", error, exc_info=not isinstance(error, LockstepError))
            return
        if self.state is State.LOADING:
            self.state = State.READY
        self._fingerprint = asyncio.create_task(self._take_digest(), name="digest")
        plan = self._engine.plan
        log.info(
            "model %s ready after %.2f s: context %d, %d pages of keys and values (%.0f MiB), %d sequences at once",
            self.name,
            time.monotonic() - started,
            plan.max_context,
            plan.num_pages,
            plan.num_pages * plan.page_bytes / 2**20,
            plan.max_sequences,
        )

    async def drain(self) -> None:
        """Refuse new requests, let the running ones end within `drain_s`, end the rest."""
        self.state = State.DRAINING
        deadline = time.monotonic() + self.config.drain_s
        while self.metrics.num_active and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        if self.metrics.num_active:
            log.warning(
                "requests that did not end within %g s and are aborted: %d",
                self.config.drain_s,
                self.metrics.num_active,
            )
        await self.close()

    async def close(self) -> None:
        """End the engine's worker."""
        self.state = State.ENDED if self.state is not State.FAILED else State.FAILED
        if self._fingerprint is not None:
            self._fingerprint.cancel()
        if self._engine is not None:
            await self._engine.close()

    @property
    def engine(self) -> AsyncEngine:
        """The engine.

        Raises:
            Refusal: 503 in every state but READY, and DRAINING for what runs.
        """
        if self._engine is None or self.state in (State.FAILED, State.ENDED):
            raise self._unavailable()
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, once loaded."""
        if self._tokenizer is None:
            raise self._unavailable()
        return self._tokenizer

    def check_open(self) -> None:
        """Raises Refusal 503 unless new requests are served."""
        if self.state is not State.READY:
            raise self._unavailable()

    async def check_health(self) -> None:
        """Raises Refusal 503 unless a token could be generated now: the worker answers between two steps."""
        self.check_open()
        try:
            self._snapshot = await asyncio.wait_for(self.engine.call(Snapshot.of), HEALTH_S)
        except (ServingError, TimeoutError) as error:
            raise Refusal(503, f"the engine does not answer: {error}", retry_after_s=5) from error

    async def metrics_page(self) -> str:
        """The Prometheus page; with the engine's last known numbers if it is busy."""
        ready = self.state is State.READY
        if ready:
            try:
                self._snapshot = await asyncio.wait_for(self.engine.call(Snapshot.of), HEALTH_S)
            except (ServingError, TimeoutError):
                ready = False
        num_faults = len(self._engine.faults) if self._engine is not None else 0
        return self.metrics.page(self._snapshot, ready=ready, model=self.name, num_faults=num_faults)

    def refusal(self, error: ServingError) -> Refusal:
        """What the engine refused, as an HTTP status."""
        if self.state is not State.READY:
            return self._unavailable()
        return Refusal(429, str(error), retry_after_s=1)

    def check_name(self, name: str | None) -> str:
        """The adapter that a client means by a model's name; empty for the model itself.

        Raises:
            Refusal: 404, the server has neither.
        """
        if name is None or name == self.name:
            return ""
        if name not in self.adapters:
            known = ", ".join(map(repr, (self.name, *self.adapters)))
            raise Refusal(404, f"the model {name[:80]!r} does not exist; this server has {known}", field="model")
        return name

    def encode(self, text: str, *, add_special: bool = True) -> tuple[int, ...]:
        """Ids of a plain prompt."""
        return tuple(self.tokenizer.encode(text, add_special=add_special, parse_special=True))

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt of a conversation."""
        template = self._template
        if template is None:
            raise self._unavailable()
        if isinstance(template, ConfigError):
            raise Refusal(400, str(template), field="messages")
        return template.render(
            messages,
            tools=tools,
            extra=extra,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def parser(
        self, prompt: str, tool_names: Sequence[str], *, forced_call: bool = False, constrained: bool = False
    ) -> Callable[[], OutputParser] | None:
        """Makes readers of this model's answers to a prompt; None when there is nothing to read out of them.

        Args:
            tool_names: functions that may be called; none: text that looks like a call is text.
            forced_call: the grammar makes the whole answer a call.
            constrained: the grammar leaves no room for thinking.
        """
        source = self._template.source if isinstance(self._template, ChatTemplate) else ""
        thinks = "<think>" in source and not constrained
        opened = thinks and prompt_opens_reasoning(prompt)
        form = "llama3" if forced_call else self.config.tool_format or tool_format_of(source)
        if not thinks and not (tool_names and form):
            return None

        def make() -> OutputParser:
            token = secrets.token_hex(12)
            tools = None
            if tool_names and form:
                tools = tool_parser(form, call_id=lambda n: f"call_{token}{n:x}", tool_names=tool_names)
            return OutputParser(ReasoningSplitter(starts_inside=opened) if thinks else None, tools)

        return make

    async def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector a prompt; the engine steps between two of them."""
        pooling, vectors = self.config.pooling, []
        for number, prompt in enumerate(prompts):
            try:
                row = await self.engine.call(partial(_embed_one, prompt=prompt, pooling=pooling))
            except InputError as error:
                raise InputError(str(error).replace("text 0", f"text {number}"), field="input") from error
            vectors.append(row)
        return vectors

    def _load(self) -> Engine:
        set_num_threads(self.config.num_threads or 0)
        model, tokenizer = self._model if isinstance(self._model, tuple) else load(self._model, self.config.dtype)
        draft = load_draft(self.config.draft, tokenizer, self.config.dtype) if self.config.draft else None
        mib = self.config.kv_memory_mib
        # Requests without a seed must not repeat themselves when the server is started again.
        wishes = replace(self.config.engine, seed=self.config.engine.seed or secrets.randbits(62))
        memory_bytes = free_memory() // 2 if mib is None else mib * 2**20
        engine = Engine(model, tokenizer, wishes, draft=draft, memory_bytes=memory_bytes)
        for entry in self.config.lora:
            name, _, path = entry.partition("=")
            adapter = load_adapter(model, path)
            engine.adapters.load(name, adapter, WeightsVersion(0, adapter_digest(adapter)))
            self.adapters[name] = path
        return engine

    async def _take_digest(self) -> None:
        """Beside the first requests: it reads all weights, and serving need not wait for it."""
        try:
            model = await self.engine.call(lambda engine: engine.model)
        except ServingError:
            return  # the server ended before
        assert isinstance(model, LanguageModel)
        digest = await asyncio.to_thread(weights_digest, model)

        def note(engine: Engine) -> None:
            if engine.model is model and not engine.weights.digest:
                engine.weights = replace(engine.weights, digest=digest)

        with contextlib.suppress(ServingError):
            await self.engine.call(note)

    async def digest_known(self) -> None:
        """Waits until the digest of the weights that were loaded is known."""
        if self._fingerprint is not None:
            await asyncio.wait([self._fingerprint])

    def _unavailable(self) -> Refusal:
        texts = {
            State.LOADING: "the model is loading",
            State.DRAINING: "the server shuts down",
            State.ENDED: "the server shuts down",
            State.FAILED: f"the model cannot be served: {self.error}",
        }
        return Refusal(503, texts.get(self.state, "the engine is not running"), retry_after_s=1)


def begin_loading(service: LanguageService) -> Future[Engine]:
    """The engine, which a thread of its own loads; begun once, waited for by `LanguageService.start`. For a caller that has
    something to do meanwhile, such as importing an HTTP server."""
    if service._loading is not None:
        return service._loading
    loading: Future[Engine] = Future()
    service._loading = loading

    def load_engine() -> None:
        loading.set_running_or_notify_cancel()  # a server that is stopped meanwhile leaves the result alone
        try:
            with collector_paused():
                engine = service._load()
            loading.set_result(engine)
        except BaseException as error:  # told by `start`
            loading.set_exception(error)

    threading.Thread(target=load_engine, name="load", daemon=True).start()
    return loading


def _embed_one(engine: Engine, *, prompt: Sequence[int], pooling: Pooling) -> list[float]:
    """Run by the engine's worker."""
    vector: list[float] = embed(engine.model, [prompt], pooling)[0].tolist()
    return vector


def _chat_template(tokenizer: Tokenizer | None, wished: str | None) -> ChatTemplate | ConfigError:
    """The template, or why there is none: a model without one still completes plain prompts."""
    if tokenizer is None:
        return ConfigError("this model has no tokenizer")
    try:
        return ChatTemplate.of(tokenizer, wished)
    except ConfigError as error:
        if wished is not None:
            raise
        return error
