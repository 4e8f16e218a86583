"""Structured output beside other streams: compiling and masks that take for ever, abort, deadlines, ends of processes.

Grammars run in threads here, by the code that processes run, so that a test decides when one answers.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from lockstep.core.errors import InputError
from lockstep.core.request import FinishReason, Request, Sample
from lockstep.core.sampling import GrammarKind, GrammarSpec, SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.engine import IDLE_WAIT_S, Engine, Gate, PauseMode
from lockstep.engine.guides import Guides
from lockstep.engine.llm import LLM
from lockstep.tokenize import grammar
from lockstep.tokenize.grammar import GrammarCompiler, GrammarMatcher
from lockstep.tokenize.grammar_host import BEGUN, GONE, MASKS, READY, START, TAKE, serve
from lockstep.tokenize.nursery import Host
from tests.engine.test_llm import make

pytest.importorskip("llguidance")
SLOW = GrammarSpec(kind=GrammarKind.REGEX, text="(hello |w)[ab]{6}c")
PROMPT = tuple(b"hello " * 8)
QUICK = GrammarSpec(kind=GrammarKind.REGEX, text="[xy]{4}(hello){2}")


class ThreadHosts:
    """Grammars in threads. Those of SLOW wait: to be compiled for `may_compile`, to answer for `may_answer`."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self.may_compile, self.may_answer = threading.Event(), threading.Event()
        self.num_opened = self.num_closed = 0
        self.ends: list[Connection] = []

    def open(self, wished: GrammarSpec) -> Host:
        ours, theirs = Pipe()
        self.num_opened += 1
        self.ends.append(theirs)
        is_slow = False

        def compile_spec(spec: grammar.GrammarSpec) -> GrammarMatcher:
            nonlocal is_slow
            if spec.text == SLOW.text:
                assert self.may_compile.wait(30)
                is_slow = True
            return self._compiler.compile(spec)

        def ration() -> None:
            assert not is_slow or self.may_answer.wait(30)

        threading.Thread(target=serve, args=(theirs, wished, compile_spec, ration), daemon=True).start()
        return _ThreadHost(ours, self)


class _ThreadHost:
    def __init__(self, pipe: Connection, hosts: ThreadHosts) -> None:
        self.pipe, self._hosts = pipe, hosts

    def close(self) -> None:
        self._hosts.num_closed += 1
        self.pipe.close()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make()


@pytest.fixture(scope="module")
def compiler(llm: LLM) -> GrammarCompiler:
    assert llm.tokenizer is not None
    return GrammarCompiler(llm.tokenizer, num_logits=264)


@pytest.fixture
def hosts(compiler: GrammarCompiler) -> Iterator[ThreadHosts]:
    hosts = ThreadHosts(compiler)
    yield hosts
    hosts.may_compile.set()
    hosts.may_answer.set()


def engine_of(llm: LLM, hosts: ThreadHosts, **changes: object) -> Engine:
    values = {"num_pages": 100, "max_sequences": 8, "max_step_tokens": 64} | changes
    return Engine(llm.engine.model, llm.tokenizer, EngineConfig(**values), hosts=hosts)  # type: ignore[arg-type]


def ask(name: str, spec: GrammarSpec | None = None, **params: object) -> Request:
    values = {"max_tokens": 40, "seed": 5, "grammar": spec, "ignore_eos": spec is None} | params
    return Request(id=name, prompt=PROMPT, params=SamplingParams(**values))  # type: ignore[arg-type]


def finish(engine: Engine) -> None:
    deadline = time.monotonic() + 30
    while engine.has_work:
        engine.step()
        assert time.monotonic() < deadline
    assert engine.audit() == []


def drawn(samples: list[Sample]) -> list[tuple[object, ...]]:
    return [(s.tokens, s.text, s.logprobs, s.sampling_logprobs, s.finish_reason) for s in samples]


def alone(llm: LLM, hosts: ThreadHosts, request: Request, **changes: object) -> list[tuple[object, ...]]:
    quick = ThreadHosts(hosts._compiler)
    quick.may_compile.set()
    quick.may_answer.set()
    engine = engine_of(llm, quick, **changes)
    samples = engine.add(request)
    finish(engine)
    assert (quick.num_opened, quick.num_closed) == (1, 1)
    return drawn(samples)


@pytest.mark.parametrize(
    ("drafts", "wishes"),
    [
        (0, {}),
        (3, {"n": 3, "temperature": 1.3}),
        (0, {"beam_width": 3, "n": 2}),
        (3, {"best_of": 3}),
        (3, {"max_tokens": 7}),
    ],
)
def test_others_go_on_while_a_grammar_is_slow_and_texts_stay_the_same(
    llm: LLM, hosts: ThreadHosts, drafts: int, wishes: dict[str, object]
) -> None:
    slow = ask("slow", SLOW, **wishes)
    expected = alone(llm, hosts, slow, max_draft_tokens=drafts)
    assert all(text[-1] in (FinishReason.STOP, FinishReason.LENGTH) for text in expected)
    engine = engine_of(llm, hosts, max_draft_tokens=drafts)
    samples = engine.add(slow)
    other, structured = engine.add(ask("plain"))[0], engine.add(ask("quick", QUICK))[0]
    while not (other.is_finished and structured.is_finished):
        engine.step()
    assert structured.text.endswith("hellohello")
    assert not any(sample.tokens or sample.is_finished for sample in samples)
    hosts.may_compile.set()
    # Now its masks do not come: it computes its prompt and waits for what it may draw.
    other = engine.add(ask("plain", seed=6))[0]
    while not other.is_finished:
        engine.step()
    while not any(sequence.num_computed for sequence in engine.scheduler.running):
        engine.step()
    num_steps = engine.counters.num_steps
    engine.step()
    engine.step()
    assert engine.counters.num_steps <= num_steps + 1
    assert engine.audit() == []
    engine.scheduler.preempt(engine.scheduler.running[-1])
    hosts.may_answer.set()
    finish(engine)
    assert drawn(samples) == expected
    assert hosts.num_closed == hosts.num_opened == 2


def test_the_only_sequence_waits_without_spinning(llm: LLM, hosts: ThreadHosts) -> None:
    expected = alone(llm, hosts, ask("llm-1", SLOW))
    engine = engine_of(llm, hosts)
    engine.add(ask("slow", SLOW))
    started, used = time.monotonic(), time.process_time()
    for _ in range(4):  # one of them may end when the process says that it has begun
        assert engine.has_work
        assert engine.step() == []
    assert time.monotonic() - started > 2.9 * IDLE_WAIT_S
    assert time.process_time() - used < IDLE_WAIT_S
    engine.abort("slow")
    offline = LLM(llm.engine.model, llm.tokenizer, num_threads=1)  # type: ignore[arg-type]
    offline.engine = engine
    for number, event in enumerate((hosts.may_compile, hosts.may_answer)):
        threading.Timer(0.05 * (number + 1), event.set).start()
    assert drawn(offline.generate([list(PROMPT)], ask("", SLOW).params)[0]) == expected


@pytest.mark.parametrize("compiled", [False, True])
def test_abort_frees_everything_at_once(llm: LLM, hosts: ThreadHosts, compiled: bool) -> None:
    engine = engine_of(llm, hosts)
    engine.add(ask("slow", SLOW, n=2))
    if compiled:
        hosts.may_compile.set()
        while not engine.scheduler.running:
            engine.step()
    else:
        engine.step()
    assert engine.abort("slow")
    assert (hosts.num_closed, engine.num_unfinished, engine.audit()) == (1, 0, [])
    assert [output.sample.finish_reason for output in engine.step()] == [FinishReason.ABORT] * 2
    assert not engine.has_work


def test_a_drain_waits_for_nobody_who_compiles(llm: LLM, hosts: ThreadHosts) -> None:
    engine = engine_of(llm, hosts)
    (slow,), (other,) = engine.add(ask("slow", SLOW)), engine.add(ask("plain"))
    engine.step()
    assert not engine.pause(PauseMode.WAIT)
    while engine.gate is Gate.DRAINING:
        engine.step()
    assert other.is_finished
    assert not slow.is_finished
    hosts.may_compile.set()
    hosts.may_answer.set()
    engine.resume()
    finish(engine)
    assert slow.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("beam_width", [0, 2])
def test_silence_ends_the_request_alone(llm: LLM, hosts: ThreadHosts, compiled: bool, beam_width: int) -> None:
    engine = engine_of(llm, hosts, grammar_timeout_s=0.02)
    (slow,), (other,) = engine.add(ask("slow", SLOW, beam_width=beam_width)), engine.add(ask("plain"))
    if compiled:
        hosts.may_compile.set()
    finish(engine)
    assert other.finish_reason is FinishReason.LENGTH
    assert (slow.finish_reason, slow.error_field) == (FinishReason.ERROR, "regex")
    what = "a token of its text" if compiled else "compiling it"
    assert f"the regex cannot be used: {what} took over 0.06 s; use fewer" in slow.error
    assert hosts.num_closed == 1


@pytest.mark.parametrize("started", [False, True])
def test_a_process_that_ends_ends_the_request_alone(llm: LLM, hosts: ThreadHosts, started: bool) -> None:
    engine = engine_of(llm, hosts)
    slow, other = engine.add(ask("slow", SLOW, n=2)), engine.add(ask("plain"))
    if started:
        hosts.may_compile.set()
        hosts.may_answer.set()
        while not slow[0].tokens:
            engine.step()
    else:
        engine.step()
    with socket.socket(fileno=os.dup(hosts.ends[0].fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
    finish(engine)
    assert other[0].finish_reason is FinishReason.LENGTH
    for sample in slow:
        assert (sample.finish_reason, sample.error_field) == (FinishReason.ERROR, "regex")
        assert "took more memory, processor time or nesting than a grammar may" in sample.error


def test_few_compile_at_a_time_and_the_first_come_first(llm: LLM, hosts: ThreadHosts) -> None:
    engine = engine_of(llm, hosts, max_sequences=3)
    slow = [engine.add(ask(f"slow{i}", SLOW))[0] for i in range(4)]
    last = engine.add(ask("quick", QUICK))[0]
    engine.step()
    assert hosts.num_opened == 2
    engine.abort("slow1")
    engine.step()
    assert hosts.num_opened == 3
    hosts.may_compile.set()
    hosts.may_answer.set()
    finish(engine)
    assert hosts.num_opened == hosts.num_closed == 5
    assert last.text.endswith("hellohello")
    texts = [sample.text for i, sample in enumerate(slow) if i != 1]
    assert len(set(texts)) == 1 != len({sample.text for sample in slow})


def test_a_bad_grammar_is_the_request_s_fault(llm: LLM, hosts: ThreadHosts) -> None:
    engine = engine_of(llm, hosts)
    bad = replace(SLOW, text="(unclosed")
    for wishes in ({}, {"n": 2}, {"beam_width": 2}, {"best_of": 2}):
        sample = engine.add(ask("bad", bad, **wishes))[0]
        finish(engine)
        assert (sample.finish_reason, sample.error_field) == (FinishReason.ERROR, "regex")
        assert "unclosed" in sample.error
    llm.engine, before = engine, llm.engine
    try:
        with pytest.raises(InputError, match="unclosed") as caught:
            llm.generate(["a", "b"], SamplingParams(grammar=bad))
    finally:
        llm.engine = before
    assert caught.value.field == "regex"
    assert engine.num_unfinished == 0


class HandHosts:
    """One process, played by the test at `theirs`."""

    def __init__(self) -> None:
        self.pipe, self.theirs = Pipe()

    def open(self, _: GrammarSpec) -> Host:
        return self

    def close(self) -> None:
        self.pipe.close()


def test_masks_that_come_late_are_not_those_of_a_later_place() -> None:
    hosts = HandHosts()
    guides = Guides(lambda: hosts, timeout_s=30.0, most=1)
    guide = guides.open(QUICK, (0,))
    guides.exchange(0.0)
    for said in (BEGUN, READY):
        hosts.theirs.send(said)
        guides.exchange(1.0, idle=True)
    assert hosts.theirs.recv() == [(START, 1)]
    hosts.theirs.send(([], False))
    guides.exchange(1.0, idle=True)
    guide.observe(1)
    guides.exchange(0.0)
    assert hosts.theirs.recv() == [(TAKE, 1, [1])]
    hosts.theirs.send(([(TAKE, 1, [2, 3], False)], True))
    guides.exchange(1.0)
    assert (guide.is_waiting, guide.forced) == (False, [2, 3])
    guide.observe(2)  # before the masks of 1 have come
    hosts.theirs.send(([(MASKS, 1, (2, 3), [(b"1", False), (b"12", False), (b"123", False)])], False))
    guides.exchange(0.0)
    assert guide.is_waiting
    assert not guide.knows(())
    assert hosts.theirs.recv() == [(TAKE, 1, [2])]
    hosts.theirs.send(([(TAKE, 1, [3], False)], True))
    hosts.theirs.send(([(MASKS, 1, (3,), [(b"12", False), (b"123", False)])], False))
    guides.exchange(1.0)
    guides.exchange(1.0, masks=True)
    assert (guide.mask(()), guide.mask((3,)), guide.forced) == (b"12", b"123", [3])


def test_a_process_that_cannot_be_had_is_not_the_clients_fault() -> None:
    hosts = HandHosts()
    guides = Guides(lambda: hosts, timeout_s=30.0, most=1)
    guide = guides.open(QUICK, (0,))
    guides.exchange(0.0)
    hosts.theirs.send(GONE)
    guides.exchange(1.0, idle=True)
    assert guide.error is not None
    assert (guide.error.field, "cannot be had" in str(guide.error)) == ("", True)
