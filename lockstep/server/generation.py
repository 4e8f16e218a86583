"""From a job to pieces of its samples: what every dialect translates into and out of.

    dialect --Job--> run: one task per prompt --AsyncEngine.generate--> queue --Piece--> dialect

A task ends with its prompt's last sample, or when the reader leaves: then it is cancelled, the engine's stream closes and
its request is aborted before the worker's next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lockstep.core.errors import InputError, ServingError
from lockstep.core.request import FinishReason, Request, Sample
from lockstep.core.sampling import SamplingParams
from lockstep.server.replies import Refusal
from lockstep.tokenize.events import ContentDelta, Event, ReasoningDelta, ToolArgumentsDelta, ToolCallStart
from lockstep.tokenize.tools import OutputParser

if TYPE_CHECKING:
    from lockstep.server.service import LanguageService


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a client wants generated: every prompt is sampled `params.n` times."""

    id: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    parser: Callable[[], OutputParser] | None = None
    """Makes the reader of one sample's text; None: all of it is content."""
    one_call: bool = False
    """Of the calls in a sample's text the client takes the first only."""
    priority: int = 0
    cache_salt: str = ""
    adapter: str = ""
    """Empty: the model alone."""


@dataclass
class Call:
    """A tool call as far as it is known."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Choice:
    """One sample and what has been read out of its text."""

    index: int
    sample: Sample
    parser: OutputParser | None
    one_call: bool = False
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def read(self, text: str, *, last: bool) -> list[Event]:
        """The events of a new piece of text."""
        if self.parser is None:
            events: list[Event] = [ContentDelta(text)] if text else []
        else:
            events = self.parser.push(text) + (self.parser.finish() if last else [])
            if self.one_call:
                calls = (ToolCallStart, ToolArgumentsDelta)
                events = [event for event in events if not (isinstance(event, calls) and event.index)]
        for event in events:
            if isinstance(event, ContentDelta):
                self.content += event.text
            elif isinstance(event, ReasoningDelta):
                self.reasoning += event.text
            elif isinstance(event, ToolCallStart):
                self.calls.append(Call(event.id, event.name))
            elif isinstance(event, ToolArgumentsDelta):
                self.calls[event.index].arguments += event.text
        return events


@dataclass(frozen=True)
class Piece:
    """What a step added to a choice: its tokens from `first` to `end`, and what they mean."""

    choice: Choice
    first: int
    end: int
    events: list[Event]
    is_finished: bool


async def run(service: LanguageService, job: Job) -> AsyncGenerator[Piece, None]:
    """Pieces of all samples as they come. Closing it aborts what still runs.

    Raises:
        InputError: the engine cannot serve it.
        Refusal: 429 too many wait, 503 the server shuts down, 500 a sample failed.
    """
    queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
    num_left = len(job.prompts) * job.params.n
    tasks = [asyncio.create_task(_feed(service, job, index, queue)) for index in range(len(job.prompts))]
    service.metrics.num_active += 1
    try:
        while num_left:
            piece = await queue.get()
            if isinstance(piece, BaseException):
                raise piece
            num_left -= piece.is_finished
            yield piece
    finally:
        service.metrics.num_active -= 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(service: LanguageService, job: Job) -> list[Choice]:
    """All choices, finished, by index."""
    choices: dict[int, Choice] = {}
    async with aclosing(run(service, job)) as pieces:
        async for piece in pieces:
            choices[piece.choice.index] = piece.choice
    return [choices[index] for index in sorted(choices)]


async def _feed(service: LanguageService, job: Job, number: int, queue: asyncio.Queue[Any]) -> None:
    params = job.params
    request = Request(
        id=f"{job.id}-{number}",
        prompt=job.prompts[number],
        params=params,
        priority=job.priority,
        cache_salt=job.cache_salt,
        adapter=job.adapter,
    )
    choices: dict[int, Choice] = {}
    clock = service.metrics.clock(len(request.prompt))
    try:
        async with aclosing(service.engine.generate(request)) as outputs:
            async for output in outputs:
                sample = output.sample
                choice = choices.get(sample.index)
                if choice is None:
                    parser = job.parser() if job.parser is not None else None
                    choice = Choice(number * params.n + sample.index, sample, parser, job.one_call)
                    choices[sample.index] = choice
                clock.tokens(sample.index, output.num, time.monotonic())
                if output.is_finished:
                    service.metrics.finished(sample)
                    _check(sample)
                events = choice.read(output.text, last=output.is_finished)
                queue.put_nowait(Piece(choice, output.first, output.first + output.num, events, output.is_finished))
    except ServingError as error:
        queue.put_nowait(error if isinstance(error, Refusal) else service.refusal(error))
    except Exception as error:  # the reader raises it
        queue.put_nowait(error)


def _check(sample: Sample) -> None:
    if sample.finish_reason is FinishReason.ERROR and sample.error_field:
        raise InputError(sample.error, field=sample.error_field)
    if sample.finish_reason is FinishReason.ERROR:
        raise Refusal(500, f"the sample could not go on: {sample.error}")
    if sample.finish_reason is FinishReason.ABORT:
        raise Refusal(503, "the server shuts down", retry_after_s=1)
