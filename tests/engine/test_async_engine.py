"""Streams, commands, clients that leave, steps that fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest
import torch

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import DeadlineError, InputError, ServingError
from lockstep.core.request import FinishReason, Request
from lockstep.core.sampling import SamplingParams
from lockstep.engine import async_engine
from lockstep.engine.async_engine import AsyncEngine
from lockstep.engine.emission import Output
from lockstep.engine.engine import Engine, PauseMode
from tests.engine.fake import FakeModel, alone, tiny


def drive(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def ask(name: str, **params: object) -> Request:
    values = {"max_tokens": 12, "seed": 4, "ignore_eos": True} | params
    return Request(id=name, prompt=tuple(range(20)), params=SamplingParams(**values))


async def read(engine: AsyncEngine, request: Request) -> list[Output]:
    return [output async for output in engine.generate(request)]


class SlowModel(FakeModel):
    """Steps of a few milliseconds, so that a client can leave between two; fails on a prompt of one token."""

    def __call__(self, batch: ForwardBatch, cache: Any) -> torch.Tensor:
        time.sleep(0.003)
        if batch.num_tokens == 1 and int(batch.positions_T[0]) == 0:
            raise RuntimeError("this prompt breaks the model")
        return super().__call__(batch, cache)


def test_streams_give_the_texts_of_requests_alone() -> None:
    async def work() -> None:
        async with AsyncEngine(Engine(FakeModel(), None, tiny())) as engine:
            requests = [ask(f"{i}", seed=i, n=1 + i % 3) for i in range(6)]
            streams = await asyncio.gather(*(read(engine, request) for request in requests))
            assert await engine.call(lambda inner: inner.audit()) == []
        for request, outputs in zip(requests, streams, strict=True):
            expected = {sample.index: sample.tokens for sample in alone(request.prompt, request.params)}
            got: dict[int, list[int]] = {index: [] for index in expected}
            for output in outputs:
                sample = output.sample
                got[sample.index] += sample.tokens[output.first : output.first + output.num]
            assert got == expected

    drive(work())


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_client_that_leaves_frees_its_pages(how: str) -> None:
    async def work() -> None:
        async with AsyncEngine(Engine(SlowModel(), None, tiny(prefix_cache=False))) as engine:
            if how == "cancel":
                task = asyncio.create_task(read(engine, ask("a", max_tokens=200, n=2)))
                await asyncio.sleep(0.05)
                assert await engine.call(lambda inner: inner.scheduler.pool.num_free) < 200
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                stream = engine.generate(ask("a", max_tokens=200, n=2))
                await anext(stream)
                await stream.aclose()
            assert await engine.call(lambda inner: inner.scheduler.pool.num_free) == 200
            assert await engine.call(lambda inner: inner.num_unfinished) == 0
            assert len(await read(engine, ask("a", max_tokens=3))) == 3

    drive(work())


@pytest.mark.parametrize("ticks", range(4))
def test_a_cancellation_that_meets_an_output_is_not_lost(ticks: int) -> None:
    async def work() -> None:
        async with AsyncEngine(Engine(FakeModel(), None, tiny())) as engine:
            await engine.call(lambda inner: inner.pause())
            task = asyncio.create_task(read(engine, ask("a")))
            while await engine.call(lambda inner: inner.num_unfinished) == 0:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            stream = engine._streams["a"]
            stream.outputs.put_nowait(Output(stream.samples[0], 0, 0, "", False))
            # The output is on its way to the reader, some turns of the loop far.
            for _ in range(ticks):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=1.0)
            assert [one.cancelled() for one in done] == [True]
            assert await engine.call(lambda inner: inner.num_unfinished) == 0

    drive(work())


def test_refusals_reach_the_client() -> None:
    async def work() -> None:
        async with AsyncEngine(Engine(FakeModel(), None, tiny(max_queue=2))) as engine:
            with pytest.raises(InputError, match="256"):
                await read(engine, ask("a", max_tokens=1000))
            with pytest.raises(InputError, match="max_queue"):
                await read(engine, ask("a", n=3))
            with pytest.raises(ZeroDivisionError):
                await engine.call(lambda inner: 1 // 0)
            assert len(await read(engine, ask("a"))) == 12

    drive(work())


def test_a_step_that_fails_ends_its_requests_only() -> None:
    async def work() -> None:
        async with AsyncEngine(Engine(SlowModel(), None, tiny())) as engine:
            bad = Request(id="bad", prompt=(1,), params=SamplingParams(max_tokens=3))
            with pytest.raises(RuntimeError, match="breaks the model"):
                await read(engine, bad)
            outputs = await read(engine, ask("good"))
            assert outputs[-1].sample.finish_reason is FinishReason.LENGTH
            assert await engine.call(lambda inner: inner.audit()) == []

    drive(work())


def test_nothing_waits_for_ever() -> None:
    async def work() -> None:
        async with AsyncEngine(Engine(FakeModel(), None, tiny()), stall_timeout_s=0.05) as engine:
            await engine.call(lambda inner: inner.pause())
            with pytest.raises(DeadlineError, match="overloaded or paused"):
                await read(engine, ask("a"))
            await engine.call(lambda inner: inner.resume())
            assert len(await read(engine, ask("a"))) == 12
        async with AsyncEngine(Engine(SlowModel(), None, tiny()), call_timeout_s=0.1) as engine:
            with pytest.raises(DeadlineError, match="did not answer"):
                await engine.call(lambda inner: time.sleep(0.3))
            await asyncio.sleep(0.4)

    drive(work())


def test_pages_are_checked_when_idle(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(async_engine, "IDLE_S", 0.02)

    async def work() -> None:
        inner, num_audits = Engine(FakeModel(), None, tiny()), 0
        audit = inner.audit

        def counted() -> list[str]:
            nonlocal num_audits
            num_audits += 1
            return audit()

        monkeypatch.setattr(inner, "audit", counted)
        async with AsyncEngine(inner) as engine:
            for busy in (1, 2):
                await read(engine, ask("a"))
                await asyncio.sleep(0.2)
                assert num_audits == busy
                assert engine.faults == ()
            await engine.call(lambda inner: inner.scheduler.pool.take(1))
            await read(engine, ask("a"))
            await asyncio.sleep(0.2)
            assert "1 holders by count and 0 by enumeration" in engine.faults[0]

    drive(work())
    assert "the idle check of pages and references found" in caplog.text


def test_close_ends_streams_and_refuses_more() -> None:
    async def work() -> None:
        engine = AsyncEngine(Engine(SlowModel(), None, tiny()))
        with pytest.raises(ServingError, match="not running"):
            await read(engine, ask("a"))
        engine.start()
        task = asyncio.create_task(read(engine, ask("a", max_tokens=200)))
        await asyncio.sleep(0.05)
        await engine.close()
        assert (await task)[-1].sample.finish_reason is FinishReason.ABORT
        with pytest.raises(ServingError, match="not running"):
            await read(engine, ask("b"))

    drive(work())


def test_weights_change_under_traffic() -> None:
    async def work() -> None:
        model = SlowModel()
        async with AsyncEngine(Engine(model, None, tiny())) as engine:
            task = asyncio.create_task(read(engine, ask("a", max_tokens=60)))
            await asyncio.sleep(0.05)

            def update() -> None:
                model.version = 1

            await engine.call(lambda inner: inner.publish(1, "new", mode=PauseMode.RECOMPUTE, update=update))
            sample = (await task)[-1].sample
            assert {weights.version for weights in sample.versions} == {0, 1}

    drive(work())
