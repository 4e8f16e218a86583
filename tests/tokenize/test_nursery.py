"""Grammars in processes of their own, the real ones: what an honest one says, and how hostile ones end."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

import pytest

from lockstep.core.errors import ConfigError
from lockstep.tokenize.grammar import GrammarCompiler, GrammarSpec
from lockstep.tokenize.grammar_host import BEGUN, COPY, END, ERROR, MASKS, READY, START, TAKE, Limits
from lockstep.tokenize.nursery import Nursery
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.vocabulary import CHARACTER_OF_BYTE, Kind

pytest.importorskip("llguidance")
WAIT_S = 60.0


def said(pipe: Connection) -> Any:
    assert pipe.poll(WAIT_S)
    return pipe.recv()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*(CHARACTER_OF_BYTE[byte] for byte in range(256)), "he", "<eos>"],
        "tokenizer.ggml.token_type": [int(Kind.NORMAL)] * 257 + [int(Kind.CONTROL)],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.eos_token_id": 257,
    }
    return Tokenizer.from_gguf_metadata(metadata)


@pytest.fixture(scope="module")
def nursery(tokenizer: Tokenizer) -> Nursery:
    return Nursery(tokenizer, tokenizer.vocab_size, Limits(memory_bytes=1 << 26, cpu_s=1.0))


def test_a_host_says_what_the_matcher_says(tokenizer: Tokenizer, nursery: Nursery) -> None:
    spec = GrammarSpec.regex("[ab]x+ and the rest")
    matcher = GrammarCompiler(tokenizer).compile(spec)
    host = nursery.open(spec)
    assert said(host.pipe) == BEGUN
    assert said(host.pipe) == READY
    a, x, forbidden = (tokenizer.encode(text, add_special=False, parse_special=False)[0] for text in "axq")
    host.pipe.send([(START, 7), (COPY, 8, 7), (MASKS, 7, (a, x, forbidden, a)), (TAKE, 8, [a, x]), (END, 7)])
    answers, more_follow = said(host.pipe)
    (masks, number, ids, found), taken = answers
    assert (masks, number, ids, more_follow) == (MASKS, 7, (a, x, forbidden, a), True)
    assert taken == (TAKE, 8, [], False)
    assert len(found) == 3  # nothing is said beyond what the grammar forbids
    (pushed,), more_follow = said(host.pipe)
    assert (pushed[:3], more_follow) == ((MASKS, 8, ()), False)
    for (mask, finished), index in zip([*found, *pushed[3]], (a, x, None, None), strict=True):
        assert mask == matcher.mask().tobytes()
        assert not finished
        assert index is None or matcher.advance(index)
    host.close()


def test_hostile_grammars_cost_their_own_process(nursery: Nursery) -> None:
    """Memory, stack, and a text that cannot go on; then an honest grammar, from the same nursery."""
    chain = "start: r0\n" + "\n".join(f'r{i}: "a{i}" r{i + 1} | "b"' for i in range(20000)) + '\nr20000: "z"'
    for spec in (GrammarSpec.regex("a?" * 20000), GrammarSpec.grammar(chain)):
        host = nursery.open(spec)
        assert said(host.pipe) == BEGUN
        with pytest.raises((EOFError, ConnectionError)):
            said(host.pipe)
        host.close()
    wide = 'start: "x" ("y" | ' + " | ".join(f'"a{i}"' for i in range(2100)) + ")"
    host = nursery.open(GrammarSpec.grammar(wide))
    assert said(host.pipe) == BEGUN
    assert said(host.pipe) == READY
    host.pipe.send([(START, 0), (MASKS, 0, ()), (TAKE, 0, [120])])
    answers, more_follow = said(host.pipe)
    if more_follow:
        answers, _ = said(host.pipe)
    word, number, message = answers[-1]
    assert (word, number) == (ERROR, 0)
    assert "the grammar cannot go on: Parser Error" in message
    host.close()
    host = nursery.open(GrammarSpec.regex("("))
    assert said(host.pipe) == BEGUN
    assert said(host.pipe).startswith("the regex cannot be used")


def test_processes_end_with_their_owner(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="eos"):
        Nursery(tokenizer, 200, Limits())
    nursery = Nursery(tokenizer, tokenizer.vocab_size, Limits())
    idle, busy = nursery.open(GrammarSpec.json_object()), nursery.open(GrammarSpec.regex("a?" * 60000))
    for host in (idle, busy):
        assert said(host.pipe) == BEGUN
    assert said(idle.pipe) == READY
    started = time.monotonic()
    del nursery
    for host in (idle, busy):
        with pytest.raises((EOFError, ConnectionError)):
            said(host.pipe)
        host.close()
    assert time.monotonic() - started < 8  # killed: compiling that takes far longer
