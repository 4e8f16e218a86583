"""`lockstep serve MODEL`, `chat` and `generate` on a tiny model."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from lockstep.cli.chat import Conversation, talk
from lockstep.cli.generate import SamplingArgs
from lockstep.cli.main import main
from lockstep.cli.model_words import names_language_model
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.llm import LLM
from lockstep.tokenize.chat import ChatTemplate
from tests.server.language.tiny import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, config=EngineConfig(num_pages=64, max_context=160, max_sequences=1), num_threads=1)


def test_what_a_word_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": "lockstep-policy"}')
    assert names_language_model(str(folder))
    assert names_language_model("org/model")
    assert not names_language_model(str(tmp_path))
    assert not any(map(names_language_model, ("--port", "8000", "a=runs/b", "./run", "runs", "lockstep/none")))


def test_generate_prints_what_the_engine_says(
    folder: Path, llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max-tokens", "6", "--seed", "4", "--n", "2", "--max-context", "100", "--kv-memory-mib", "4"]
    expected = "".join(
        f"hello{sample.text}\n" for sample in llm.generate("hello", SamplingParams(max_tokens=6, seed=4, n=2))[0]
    )
    assert main(["generate", str(folder), "hello", *flags]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["generate", str(folder), *flags]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nhello\n"))
    assert main(["generate", str(folder), *flags]) == 2
    assert "prompt 2 of 3 has no tokens" in capsys.readouterr().err
    assert main(["generate", str(folder / "none"), "hello"]) == 2


def test_chat_keeps_its_turns(llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert llm.tokenizer is not None
    conversation = Conversation(llm, ChatTemplate.of(llm.tokenizer), SamplingArgs(max_tokens=5, seed=1), "be brief")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nthe world\n"))
    assert talk(conversation, interactive=False) == 0
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    said = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
    assert capsys.readouterr().out == "".join(text + "\n" for text in said)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/reset\nhello\n/bye\nnever\n"))
    talk(conversation, interactive=False)
    assert conversation.messages[1:] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": said[0]},
    ]


def test_chat_survives_ctrl_c_and_a_full_context(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert llm.tokenizer is not None
    conversation = Conversation(llm, ChatTemplate.of(llm.tokenizer), SamplingArgs(max_tokens=50, seed=1))
    pieces = conversation.answer("hello")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1] == {"role": "assistant", "content": first}
    assert not llm.engine.has_work
    assert llm.engine.audit() == []
    before = list(conversation.messages)
    talk_line = "x" * 200
    from lockstep.cli.chat import _answer

    _answer(conversation, talk_line)
    assert "/reset" in capsys.readouterr().err
    assert conversation.messages == before


@pytest.mark.slow
def test_serve_is_a_process_that_drains(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lockstep.cli.main", "serve", str(folder), "--port", "0", "--kv-memory-mib", "8"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while (found := re.search(r"running on http://(127\.0\.0\.1:\d+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        url = f"http://{found[1]}"
        while httpx.get(url + "/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        body = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            # A machine fast enough has drained and closed by now; `tests/server/language/test_life.py` holds the 503 itself.
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.post(url + "/v1/completions", json=body).status_code == 503
            assert list(lines)[-2] == "data: [DONE]"
        process.wait(30)
        assert process.returncode == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def test_a_mistyped_command_is_no_turn(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llm.tokenizer is not None
    conversation = Conversation(llm, ChatTemplate.of(llm.tokenizer), SamplingArgs(max_tokens=2, seed=1))
    lines = iter(["/set temperature 3", "/?", "/etc/hosts is a file", "/bye"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    talk(conversation, interactive=True)
    assert "there is no command /set: /reset forgets" in capsys.readouterr().out
    assert [message["content"] for message in conversation.messages][::2] == ["/etc/hosts is a file"]
